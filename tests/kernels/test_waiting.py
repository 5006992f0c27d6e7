# SPDX-License-Identifier: Apache-2.0
"""Trees by request and by step: what `StepTrees.feed` says of a batch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from tests.harness.poison import poisoned
from tests.kernels.build import reference_trees
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import CANDIDATE, WINDOW, DraftTree
from vllm_lookahead.engine.v2.sizes import NGRAM, TREE, VERIFY, RequestSizes
from vllm_lookahead.engine.v2.sizes import WINDOW as W_ROW
from vllm_lookahead.engine.v2.trees import Plan, StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.ops import TritonOps

SLOTS = 8


def column(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def draw_trees(sizes: np.ndarray, server: LookaheadParams, seed: int) -> DraftTree:
    """Trees of random candidates, some of which agree or end early."""
    device = torch.get_default_device()
    draw = torch.Generator(device).manual_seed(seed)
    count, k = sizes.shape[1], server.ngram_size - 1
    g, w = server.verification_set_size, server.window_size
    candidates = torch.randint(2, 5, (count, g, k), generator=draw).int()
    lengths = torch.randint(0, k + 1, (count, g, 1), generator=draw)
    lengths = lengths.minimum(column(sizes[NGRAM])[:, None, None] - 1)
    lengths = lengths.where(
        torch.arange(g)[:, None] < column(sizes[VERIFY])[:, None, None], 0
    )
    candidates[torch.arange(k) >= lengths] = -1
    for b in range(count):  # distinct
        seen: set[tuple[int, ...]] = set()
        for i in range(g):
            chain = tuple(candidates[b, i].tolist())
            if chain in seen:
                candidates[b, i] = -1
            seen.add(chain)
    batch = RequestBatch(
        torch.zeros(count, 4, dtype=torch.int32),
        column([10] * count),
        column(list(range(90, 90 + count))),
        column(sizes[W_ROW]),
        column(sizes[NGRAM]),
        column(sizes[VERIFY]),
        column(sizes[TREE]),
    )
    window = torch.randint(2, 90, (count, k, w), generator=draw).int()
    return reference_trees(batch, candidates, window, server.max_tree_size)


def flat_batch(indices: list[int], num_tokens: list[int], trees: int) -> Any:
    """As much of an `InputBatch` as `feed` reads; 10 tokens before each tree."""
    start = np.cumsum([0, *num_tokens])
    before = [10] * trees + [0] * (len(indices) - trees)
    return SimpleNamespace(
        num_reqs=len(indices),
        num_tokens=int(start[-1]),
        num_draft_tokens_per_req=np.full(trees, 9),
        idx_mapping_np=np.array(indices),
        idx_mapping=torch.tensor(indices),
        num_scheduled_tokens=np.array(num_tokens, dtype=np.int32),
        query_start_loc=column(start),
        seq_lens=column(before) + column(num_tokens),
        input_ids=torch.arange(start[-1], dtype=torch.int32),
    )


@pytest.mark.parametrize("server", [(3, 3, 3), (2, 2, 3), (0, 4, 2), (4, 5, 0)])
@pytest.mark.parametrize("cut", [None, 2, 5, -1])
def test_feed(server: tuple[int, int, int], cut: int | None) -> None:
    """Trees fed whole, cut to so many nodes, and whole in too little room."""
    params = LookaheadParams(*server)
    sizes = RequestSizes(SLOTS, params)
    asked: list[dict[str, int]] = [{}, {"lookahead_verification_set_size": 0}, {}]
    indices = [5, 2, 7, 0]  # the last one is prefilled
    for index, extra in zip(indices, [*asked, {"lookahead": 0}], strict=True):
        sizes.add_request(index, SamplingParams(extra_args=extra), chain=False)
    n, t = params.ngram_size, params.max_tree_size
    of_trees = np.array(indices[:3])
    device = torch.get_default_device()
    tree = draw_trees(sizes.table[:, of_trees], params, seed=sum(server))
    waiting = WaitingTrees(SLOTS, t, device)
    drafts = torch.full((3, n - 1), -7)
    chances = torch.rand(3, t)
    waiting.store(tree, chances, torch.tensor(indices[:3]), drafts)
    falling = torch.cat([torch.ones(3, 1), chances[:, 1:]], 1).cummin(1).values
    assert torch.equal(waiting.chances[indices[:3]], falling)

    fed = sizes.table[TREE, of_trees].copy()
    if cut is not None:
        fed = np.minimum(fed, cut) if cut > 0 else np.maximum(fed + cut, 1)
    num_tokens = [*fed.tolist(), 6]
    start = np.cumsum([0, *num_tokens])
    if min(fed) == 1:
        pytest.skip("vLLM would put the request without drafts last")
    batch = flat_batch(indices, num_tokens, trees=3)
    plan = Plan.make(batch, sizes, device)
    step = StepTrees(SLOTS, 64 * SLOTS, params, device)
    last_sampled = torch.full((SLOTS, 1), -3)
    last_sampled[indices[:3], 0] = tree.tokens[:, 0].long()
    step.feed(plan, waiting, batch, torch.arange(start[-1]), last_sampled)

    rows = step.trees(4)
    expected_rows: list[list[int]] = []
    refill: list[tuple[int, int]] = []
    for b in range(3):
        real = min(int(tree.num_nodes[b]), int(fed[b]))
        whole = int(fed[b]) == sizes.table[TREE, of_trees[b]]
        assert rows.num_nodes[b] == real
        assert rows.tokens[b, :real].tolist() == tree.tokens[b, :real].tolist()
        assert rows.parents[b, :real].tolist() == tree.parents[b, :real].tolist()
        assert (rows.kinds[b] == CANDIDATE).sum() == (
            tree.kinds[b, :real] == CANDIDATE
        ).sum()
        kept = (tree.kinds[b] == WINDOW).sum() if whole else 0
        assert (rows.kinds[b] == WINDOW).sum() == kept
        assert step.position[b] == 10
        first = int(start[b])
        most = 1 + int(sizes.table[VERIFY, of_trees[b]]) * (n - 1)
        expected_rows += [[first + i, b * t + i] for i in range(min(most, fed[b]))]
        width = int(sizes.table[W_ROW, of_trees[b]]) if whole else 0
        for j in range(width):
            node = real - width + j
            refill.append(
                (first + node, SLOTS * t if n == 2 and j == 0 else b * t + node)
            )
    assert step.position[3] == 5
    assert rows.tokens[3, 0] == batch.input_ids[-1]
    expected_rows.append([int(start[-1]) - 1, 3 * t])
    count = len(expected_rows)
    got = torch.stack([step.row_token, step.row_node], 1)
    assert got[:count].tolist() == expected_rows
    assert batch.logits_indices.tolist() == [row for row, _ in expected_rows]
    nodes = got[count : count + len(refill)].tolist()
    assert [n for _, n in nodes] == [n for _, n in refill]
    final = step.final_slot[: start[-1]]
    is_final = torch.ones(int(start[-1]), dtype=torch.bool)
    for b in range(3):
        is_final[start[b] + 1 : start[b + 1]] = False
    assert torch.equal(final >= 0, is_final)

    for b in range(3):
        chain = drafts[b].tolist()
        length = 0
        while length < n - 1 and int(tree.depths[b, length + 1]) == length + 1:
            if int(tree.kinds[b, length + 1]) != CANDIDATE:
                break
            length += 1
        assert chain[:length] == tree.tokens[b, 1 : length + 1].tolist()
        assert chain[length:] == [0] * (n - 1 - length)


def test_nothing_is_harvested_of_what_was_sampled_for_another() -> None:
    """A tree with few candidates fits its share, and yet there are no logits."""
    params, other = LookaheadParams(3, 3, 3), 777
    device = torch.get_default_device()
    sizes = RequestSizes(SLOTS, params)
    sizes.add_request(2, SamplingParams(), chain=False)
    table = column([[0, 1, 2]])
    one = [column([x]) for x in (10, 5, 3, 3, 3, 12)]
    candidates = torch.full((1, 3, 2), -1, dtype=torch.int32)
    window = torch.arange(20, 26).view(1, 2, 3).int()
    batch = RequestBatch(table, *one)
    tree = reference_trees(batch, candidates, window, params.max_tree_size)
    assert tree.num_nodes[0] == 6
    waiting, step = (
        WaitingTrees(SLOTS, 12, device),
        StepTrees(SLOTS, 64, params, device),
    )
    drafts = torch.zeros(1, 2, dtype=torch.int64)
    waiting.store(tree, torch.zeros(1, 12), torch.tensor([2]), drafts)
    pages = BlockPages.allocate(3, 16, params, device)
    ops = TritonOps(params, SLOTS, device)
    for fed in (11, 12):
        batch = flat_batch([2], [fed], trees=1)
        plan = Plan.make(batch, sizes, device)
        last_sampled = torch.full((SLOTS, 1), 5)
        step.sampled.fill_(other)
        step.feed(plan, waiting, batch, torch.arange(fed), last_sampled)
        step.sampled[step.row_node[plan.cu_window_np[0] : plan.cu_window_np[1]]] = 8
        verdict = ops.verify(step.trees(1), step.sampled_tokens(1), 3)
        requests = plan.batch(table, step.position[:1], step.root[:1])
        ops.update(pages, requests, step.trees(1), step.sampled_tokens(1), verdict)
        assert not (pages.ring == other).any() and not (pages.window == other).any()
        assert (pages.window == 8).any() == (fed == 12)


@pytest.mark.parametrize("server", [(0, 3, 0), (1, 4, 0)])
def test_no_draft_is_made_up(server: tuple[int, int, int]) -> None:
    """Where trees have fewer nodes than a request has drafts."""
    params, device = LookaheadParams(*server), torch.get_default_device()
    waiting = WaitingTrees(SLOTS, params.max_tree_size, device)
    step = StepTrees(SLOTS, 64, params, device)
    drafts = torch.full((2, params.ngram_size - 1), -7)
    for seed in range(100):
        with poisoned(seed):
            trees, index = step.trees(2), torch.tensor([3, 5])
            waiting.store(trees, waiting.chances[:2], index, drafts)
        assert not drafts.any()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("idx_mapping", lambda x: x.float()),
        ("query_start_loc", lambda x: x.long()),
        ("seq_lens", lambda x: x[:0]),
        ("input_ids", lambda x: x[::2]),
    ],
)
def test_refusals(name: str, change: Any) -> None:
    params, device = LookaheadParams(3, 3, 3), torch.get_default_device()
    sizes = RequestSizes(SLOTS, params)
    sizes.add_request(2, SamplingParams(), chain=False)
    waiting, step = (
        WaitingTrees(SLOTS, 12, device),
        StepTrees(SLOTS, 64, params, device),
    )
    batch = flat_batch([2], [12], trees=1)
    plan = Plan.make(batch, sizes, device)
    setattr(batch, name, change(getattr(batch, name)))
    with pytest.raises(ValueError, match=f"^{name} is"):
        step.feed(plan, waiting, batch, torch.arange(12), torch.zeros(SLOTS, 1).long())
    drafts = torch.zeros(SLOTS, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="^drafts is"):
        waiting.store(step.tree, waiting.chances, torch.arange(SLOTS), drafts.int())


@pytest.mark.parametrize("server", [(3, 3, 3), (2, 2, 3), (0, 2, 0)])
def test_warming_up_touches_one_request(server: tuple[int, int, int]) -> None:
    params = LookaheadParams(*server)
    device = torch.get_default_device()
    waiting = WaitingTrees(SLOTS, params.max_tree_size, device)
    step = StepTrees(SLOTS, 64, params, device)
    waiting.columns.fill_(7)
    step.warm_up(waiting, torch.zeros(1, params.ngram_size - 1, dtype=torch.int64))
    assert (waiting.columns[:, 1:] == 7).all()
    assert not step.position[1:].any() and not step.sampled.any()
