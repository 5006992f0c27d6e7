# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from tests.core.build import (
    Row,
    make_batch,
    make_hints,
    make_pages,
    path_to,
    put_answers,
)
from tests.core.equivalence import (
    SHAPES,
    Shape,
    State,
    assert_same_trees,
    random_hints,
    random_state,
)
from tests.kernels.build import (
    POISON,
    REFERENCE,
    AnySizeTritonOps,
    poison_table,
    poisoned,
)
from vllm_lookahead.core.draft import grow
from vllm_lookahead.core.draft.estimate import WEIGHTS, Hints
from vllm_lookahead.core.draft.grow import BEAM
from vllm_lookahead.core.draft.index import Index
from vllm_lookahead.core.draft.noise import cpu_noise, gpu_noise
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels import index
from vllm_lookahead.triton_kernels.draft import DraftScratch, draft_trees
from vllm_lookahead.triton_kernels.index import IndexTables, file_contexts

COLUMNS = "tokens", "parents", "depths", "kinds"


def poisoned_hints(hints: Hints) -> Hints:
    """Garbage where no token is."""
    logprobs = hints.bigram_logprobs.masked_fill(hints.bigrams == EMPTY, torch.nan)
    return replace(hints, bigram_logprobs=logprobs)


def assert_same_draft(
    state: State, hints: Hints, weights: Mapping[str, float] = WEIGHTS
) -> tuple[DraftTree, torch.Tensor]:
    """Padding is compared as well, of trees and of chances."""
    pages, batch, g = state.pages, state.batch, state.g
    tree, chances = REFERENCE.draft(pages, batch, hints, g, weights)
    nearly_all = poison_table(batch, pages.block_size, ahead=-1)
    hints = poisoned_hints(hints)
    own, own_chances = AnySizeTritonOps().draft(pages, nearly_all, hints, g, weights)
    torch.testing.assert_close(own_chances, chances, rtol=1e-4, atol=1e-6)
    if any(not torch.equal(getattr(tree, c), getattr(own, c)) for c in COLUMNS):
        assert_same_but_for_ties(tree, chances, own, own_chances)
    else:
        assert_same_trees(tree, own)
    return tree, chances


def assert_same_but_for_ties(
    tree: DraftTree, chances: torch.Tensor, own: DraftTree, own_chances: torch.Tensor
) -> None:
    """Nodes whose steps are the same in another order are as likely but for rounding.

    float32 may put them the other way round, and at the end of a tree take the other.
    """
    assert torch.equal(tree.num_nodes, own.num_nodes)
    assert torch.equal(tree.kinds, own.kinds)
    theirs, ours = by_path(tree, chances), by_path(own, own_chances)
    for path in theirs.keys() & ours.keys():
        assert ours[path] == pytest.approx(theirs[path], rel=1e-4)
    for path in theirs.keys() ^ ours.keys():
        least = min(x for other, x in theirs.items() if other[0] == path[0])
        assert (theirs | ours)[path] == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_same_as_the_reference(name):
    """With and without noise, a threshold and a limit of nodes."""
    shape = SHAPES[name]
    for seed in range(3):
        state = random_state(shape, seed)
        assert_same_draft(state, random_hints(shape, state.n, seed, gpu_noise))


def by_path(tree: DraftTree, chances: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The chance of each candidate, by its request and the tokens that lead to it."""
    found = {}
    for b, nodes in enumerate(tree.nodes()):
        for i, node in enumerate(nodes):
            if node.kind == CANDIDATE:
                path = [nodes[at].token for at in path_to(nodes, i)]
                found[b, *path] = float(chances[b, i])
    return found


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 64), (0, 9, 63), (40, 6, 62), (1, 16, 33), (64, 3, 64), (0, 16, 34)],
)
def test_large_trees(sizes):
    """Of up to 512 nodes, more of a level than have children.

    Two ways through the same bigrams are as likely, and come in any order.
    """
    w, n, g = sizes
    shape = Shape(w, n, g, batch=2, vocab=70, num_blocks=9, same_sizes=True)
    state = random_state(shape, seed=1)
    hints = random_hints(shape, n, 3, gpu_noise)
    tree, chances = REFERENCE.draft(state.pages, state.batch, hints, g)
    own, own_chances = AnySizeTritonOps().draft(state.pages, state.batch, hints, g)
    expected, found = by_path(tree, chances), by_path(own, own_chances)
    assert found == pytest.approx(expected, rel=1e-4, abs=0)
    assert torch.equal(tree.num_nodes, own.num_nodes)
    torch.testing.assert_close(own_chances, chances, rtol=1e-4, atol=0)
    per_level = (tree.kinds == CANDIDATE).sum(1) / (n - 1)
    assert (per_level > min(g / 2, BEAM)).any()


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_splits_of_a_ragged_batch(splits):
    shape = Shape(3, 4, 3, batch=3, num_blocks=61, vocab=4, holes=True)
    state = random_state(shape, seed=splits)
    hints = random_hints(shape, state.n, splits, gpu_noise)
    expected, _ = REFERENCE.draft(state.pages, state.batch, hints, state.g)
    b, blocks = state.batch.block_table.shape
    tables = IndexTables.allocate(b, blocks * 16, state.pages.tokens.device)
    scratch = DraftScratch.allocate(b, 9, state.pages.tokens.device)
    t = expected.tokens.shape[1]
    tree = DraftTree(*(poisoned(b, t) for _ in COLUMNS), poisoned(b))
    file_contexts(state.pages, state.batch, tables, splits)
    chances = torch.empty(b, t)
    draft_trees(
        state.pages, state.batch, hints, WEIGHTS, tables, scratch, tree, chances
    )
    assert_same_trees(expected, tree)


def test_many_requests():
    shape = Shape(5, 4, 5, batch=40, vocab=6, num_blocks=2)
    state = random_state(shape, seed=2)
    assert_same_draft(state, random_hints(shape, state.n, 2, gpu_noise))


@pytest.mark.parametrize("position", [1000, 8190])
def test_a_long_context(position):
    """Rings and answers within reach of the root, and more that are not."""
    shape = Shape(15, 5, 15, batch=1, vocab=300, num_blocks=512, same_sizes=True)
    state = random_state(shape, seed=position)
    state.batch.position[:] = position
    assert_same_draft(state, random_hints(shape, 5, 0, gpu_noise))


@pytest.mark.parametrize("successors", [0, 1, 16, 30])
def test_bigrams_of_any_width(successors):
    shape = Shape(2, 4, 6, vocab=50)
    state = random_state(shape, seed=0)
    hints = random_hints(shape, 4, 0, gpu_noise)
    bigrams = torch.rand(40, 50).argsort(-1)[:, :successors].int().contiguous()
    logprobs = -4 * torch.rand(40, successors)
    hints = replace(hints, bigrams=bigrams, bigram_logprobs=logprobs)
    assert_same_draft(state, hints)


def test_nothing_is_known_but_the_text():
    shape = Shape(2, 4, 6, vocab=3)
    state = random_state(shape, seed=0)
    assert_same_draft(state, make_hints(3, 4, noise=gpu_noise))


def test_weights_are_arguments():
    shape = Shape(2, 4, 6, vocab=30, same_sizes=True)
    state = random_state(shape, seed=0)
    hints = random_hints(shape, 4, 0, gpu_noise)
    values = 0.3, 0.7, 1.1, 0.2, 0.5, 0.9, 0.6, 1.3, 2.0, 0.4
    weights = dict(zip(WEIGHTS, values, strict=True))
    _, usual = assert_same_draft(state, hints)
    _, others = assert_same_draft(state, hints, weights)
    assert not torch.allclose(usual, others)


def test_equals_come_in_the_order_of_the_reference():
    """Of parents, then of tokens; and what is shallower goes first."""
    pages = make_pages(2, 16, 0, 4)
    said = {token: -1.0 for token in (9, 3, 7, 5)}
    put_answers(pages, 0, [([token], said) for token in (1, 3, 5, 7, 9)])
    pages.tokens[0, 0] = 8
    for g, most in ((4, 100), (3, 100), (16, 11), (2, 4)):
        rows = [Row([0, 1], 1, 1, g=g, max_nodes=most)]
        state = State(pages, make_batch(rows), 4, 16)
        tree, chances = assert_same_draft(state, make_hints(1, 4, noise=gpu_noise))
    assert tree.tokens[0, :4].tolist() == [1, 9, 3, 9]
    assert chances[0, 1] == chances[0, 2]


def test_a_token_that_is_sure_has_a_child_as_likely():
    """No rounding puts a child before its parent."""
    pages = make_pages(2, 16, 0, 6)
    pages.tokens[0, :8] = 4
    state = State(pages, make_batch([Row([0, 1], 8, 4, n=6, g=2)]), 6, 2)
    weights = WEIGHTS | dict.fromkeys(("text1", "text2", "text3"), 60.0)
    tree, chances = assert_same_draft(state, make_hints(1, 6, noise=gpu_noise), weights)
    assert tree.parents[0, :6].tolist() == [-1, 0, 1, 2, 3, 4]
    assert (chances[0, 1:6] == 1).all()


def test_one_seed_a_request():
    """As the V2 sampler has it: a column, or the same seed at every depth."""
    shape = Shape(0, 5, 6, vocab=40, same_sizes=True)
    state = random_state(shape, seed=0)
    hints = random_hints(shape, 5, 0, gpu_noise)
    seeds = hints.seeds[:, :1]
    hints = replace(hints, seeds=seeds.expand(-1, 4))
    tree, _ = assert_same_draft(state, hints)
    for narrow in (seeds, seeds.contiguous(), seeds[:, 0].contiguous()[:, None]):
        hints = replace(hints, seeds=narrow)
        own, _ = AnySizeTritonOps().draft(state.pages, state.batch, hints, state.g)
        assert_same_trees(tree, own)


def test_padding_has_no_node_and_reads_nothing():
    pages = make_pages(2, 16, 3, 4)
    row = Row([POISON], POISON, POISON, w=0, g=0, max_nodes=0)
    hints = make_hints(1, 4, noise=gpu_noise)
    tree, chances = AnySizeTritonOps().draft(pages, make_batch([row]), hints, 2)
    assert tree.tokens.shape[1] == LookaheadParams(3, 4, 2).max_tree_size
    assert tree.num_nodes.tolist() == [0]
    assert (tree.tokens == EMPTY).all() and (tree.parents == EMPTY).all()
    assert (tree.kinds == ROOT).all() and (tree.depths == 0).all()
    assert (chances == 0).all()


def test_padding_beside_others():
    shape = SHAPES["small"]
    state = random_state(shape, 1)
    expected, _ = REFERENCE.draft(
        state.pages, state.batch, make_hints(3, state.n), state.g
    )
    rows = torch.arange(3).repeat_interleave(2)
    batch = replace(
        state.batch, **{k: x[rows].contiguous() for k, x in vars(state.batch).items()}
    )
    for name in ("window_size", "verification_set_size", "max_nodes"):
        getattr(batch, name)[::2] = 0
    batch.block_table[::2] = POISON
    batch.position[::2] = POISON
    hints = make_hints(6, state.n, noise=gpu_noise)
    tree, _ = AnySizeTritonOps().draft(state.pages, batch, hints, state.g)
    assert tree.num_nodes[::2].tolist() == [0, 0, 0]
    for name in (*COLUMNS, "num_nodes"):
        assert torch.equal(getattr(tree, name)[1::2], getattr(expected, name)), name


def test_the_first_root_has_no_history():
    """Position 0: nothing to seed the window with but the root."""
    pages = make_pages(2, 16, 3, 4)
    state = State(pages, make_batch([Row([1], 0, 42, w=3, n=4, g=3)]), 4, 3)
    bigrams = torch.full((43, 1), EMPTY, dtype=torch.int32)
    bigrams[42], bigrams[7] = 7, 42
    logprobs = torch.zeros(43, 1)
    hints = make_hints(1, 4, bigrams=bigrams, bigram_logprobs=logprobs, noise=gpu_noise)
    tree, _ = assert_same_draft(state, hints)
    assert tree.tokens[0, :12].tolist() == [42, 7, 42, 7, *[42] * 8]


def test_a_full_tree_of_no_candidates():
    state = random_state(Shape(4, 4, 0, same_sizes=True), 0)
    tree, _ = assert_same_draft(state, make_hints(3, 4, noise=gpu_noise))
    assert (tree.num_nodes == 12).all()


def test_what_cannot_be_drafted():
    state = random_state(SHAPES["small"], 0)
    ops, n = AnySizeTritonOps(), state.n
    for noise in (cpu_noise, lambda *key: 0.0):
        with pytest.raises(ValueError, match="knows `gpu_noise` only"):
            ops.draft(state.pages, state.batch, make_hints(3, n, noise=noise), state.g)


def test_requests_beyond_the_tables_draft_from_bigrams_alone(monkeypatch):
    """More than share a step's nodes; those before them are drafted for as ever."""
    monkeypatch.setattr(index, "MAX_TABLES", 1)
    shape = SHAPES["small"]
    state = random_state(shape, seed=2)
    hints = random_hints(shape, state.n, 2, gpu_noise)
    pages, batch, g = state.pages, state.batch, state.g
    batch.verification_set_size[:], batch.max_nodes[:] = g, 100
    batch.window_size[:] = 0
    with_text, _ = REFERENCE.draft(pages, batch, hints, g)
    own, _ = AnySizeTritonOps().draft(pages, batch, hints, g)
    monkeypatch.setattr(grow, "text_index", lambda *args: Index(1))
    monkeypatch.setattr(grow, "answer_index", lambda *args: Index(1))
    alone, _ = REFERENCE.draft(pages, batch, hints, g)
    trees, expected = own.nodes(), alone.nodes()
    assert trees[0] == with_text.nodes()[0] != expected[0]
    assert trees[1:] == expected[1:] != with_text.nodes()[1:]
