# SPDX-License-Identifier: Apache-2.0
"""A launcher refuses what its kernel would misread."""

from dataclasses import replace

import pytest
import torch

from tests.core.build import ints
from tests.core.equivalence import Shape, State, random_hints, random_state
from tests.kernels.build import REFERENCE, AnySizeTritonOps, poisoned, random_draft
from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.draft.estimate import WEIGHTS
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import NUM_ANSWERS
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.triton_kernels import checks
from vllm_lookahead.triton_kernels import verify as verify_kernels
from vllm_lookahead.triton_kernels.answers import keep_answers, likeliest_tokens
from vllm_lookahead.triton_kernels.draft import DraftScratch, draft_trees
from vllm_lookahead.triton_kernels.index import IndexTables, file_contexts
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.verify import verify
from vllm_lookahead.triton_kernels.write import write_tokens

SHAPE = Shape(3, 4, 3, block_size=8)


@pytest.fixture
def state() -> State:
    return random_state(SHAPE, seed=0)


def rows_apart(values: torch.Tensor) -> torch.Tensor:
    """The same values, with a gap between rows."""
    return torch.nn.functional.pad(values, (0, 1))[:, :-1]


def draft(state: State) -> None:
    hints = random_hints(SHAPE, state.n, 0, gpu_noise)
    AnySizeTritonOps().draft(state.pages, state.batch, hints, state.g)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position", lambda x: x.long()),
        ("root", lambda x: x[:-1]),
        ("window_size", lambda x: torch.stack([x, x], 1)[:, 0]),
        ("block_table", lambda x: x.t().contiguous().t()),
        ("max_nodes", lambda x: x[:, None]),
    ],
)
def test_batch(state, name, change):
    changed = change(getattr(state.batch, name))
    state.batch = replace(state.batch, **{name: changed})
    with pytest.raises(ValueError, match=f"^{name} is"):
        draft(state)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda x: x[:-1]),
        ("ring", lambda x: x[..., :-1].contiguous()),
        ("ring_count", lambda x: x.long()),
        ("window", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
        ("answers", lambda x: x[..., 1:].contiguous()),
        ("answer_logprobs", lambda x: x.half()),
        ("answer_count", lambda x: x[1:]),
    ],
)
def test_pages(state, name, change):
    pages = replace(state.pages, **{name: change(getattr(state.pages, name))})
    state.pages = pages
    with pytest.raises(ValueError, match=rf"^pages\.{name} is"):
        draft(state)
    with pytest.raises(ValueError, match=rf"^pages\.{name} is"):
        write_tokens(pages, torch.arange(3), torch.arange(3))


def test_slots_and_tokens(state):
    with pytest.raises(ValueError, match=r"^slots is torch\.int32"):
        write_tokens(state.pages, torch.arange(3).int(), torch.arange(3))
    with pytest.raises(ValueError, match=r"^tokens is torch\.float32 \(3,\)"):
        write_tokens(state.pages, torch.arange(3), torch.zeros(3))


def test_trees_and_what_is_written(state):
    tree = random_draft(state, SHAPE, 0)
    b, t = tree.tokens.shape
    verdict = REFERENCE.verify(tree, tree.tokens, 4)
    apart = replace(verdict, path=rows_apart(verdict.path))
    with pytest.raises(ValueError, match=r"^verdict.path is .* strides \(5, 1\)"):
        verify(tree, tree.tokens, apart)
    with pytest.raises(ValueError, match="^sampled is"):
        verify(tree, tree.tokens[:, 1:], verdict)
    moved = replace(tree, kinds=rows_apart(tree.kinds))
    with pytest.raises(ValueError, match=r"^tree.kinds and tree.tokens differ"):
        verify(moved, tree.tokens, verdict)
    start = torch.zeros(b + 1, dtype=torch.int32)
    flat = poisoned(b * t), poisoned(b * t)
    bits = poisoned(b, t, -(-t // 32))
    with pytest.raises(ValueError, match=r"^bits is .* takes torch.int32 \("):
        build_mask(tree, state.batch.position, start, bits[:, :-1], *flat)
    with pytest.raises(ValueError, match="^query_start_loc is"):
        build_mask(tree, state.batch.position, start[1:], bits, *flat)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bigrams", lambda x: x.long()),
        ("bigram_logprobs", lambda x: x[:, 1:].contiguous()),
        ("temperature", lambda x: x.double()),
        ("seeds", lambda x: x.int()),
        ("seeds", lambda x: x[:, :2]),
        ("seeds", lambda x: x[:-1]),
        ("seeds", lambda x: x[:, 0]),
    ],
)
def test_hints(state, name, change):
    hints = random_hints(SHAPE, state.n, 0, gpu_noise)
    hints = replace(hints, **{name: change(getattr(hints, name))})
    with pytest.raises(ValueError, match=rf"^hints\.{name} is"):
        AnySizeTritonOps().draft(state.pages, state.batch, hints, state.g)


def test_scratch(state):
    """Tables and what is grown: of the server's sizes, for at least the batch."""
    b, t = 3, 1 + 9 + 8
    device = state.pages.tokens.device
    hints = random_hints(SHAPE, state.n, 0, gpu_noise)

    def run(tables=None, scratch=None, chances=None, columns=t):
        tree = DraftTree(*(poisoned(b, columns) for _ in range(4)), poisoned(b))
        draft_trees(
            state.pages,
            state.batch,
            hints,
            WEIGHTS,
            tables or IndexTables.allocate(b, 512, device),
            scratch or DraftScratch.allocate(b, 9, device),
            tree,
            torch.empty(b, t) if chances is None else chances,
        )

    run()
    with pytest.raises(ValueError, match=r"^scratch\.keys is"):
        run(scratch=DraftScratch.allocate(b, 8, device))
    with pytest.raises(ValueError, match="too small for 3 requests"):
        run(scratch=DraftScratch.allocate(b - 1, 9, device))
    with pytest.raises(ValueError, match=r"^tree\.tokens is"):
        run(columns=t - 1)
    with pytest.raises(ValueError, match="^chances is"):
        run(chances=torch.empty(b, t, dtype=torch.float64))
    tables = IndexTables.allocate(b, 512, device)
    tables.text = tables.text.int()
    with pytest.raises(ValueError, match=r"^tables\.text is"):
        run(tables=tables)
    with pytest.raises(ValueError, match=r"^tables\.text is"):
        file_contexts(state.pages, state.batch, tables)
    tables = IndexTables.allocate(b, 512, device)
    tables.answers = tables.answers[:, 1:]
    with pytest.raises(ValueError, match=r"^tables\.answers is"):
        file_contexts(state.pages, state.batch, tables)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda x: x[:, 1:].contiguous()),
        ("logprobs", lambda x: x.half()),
        ("first_row", lambda x: x.long()),
    ],
)
def test_answers(state, name, change):
    tree = random_draft(state, SHAPE, 0)
    verdict = REFERENCE.verify(tree, tree.tokens, 4)
    shape = 60, NUM_ANSWERS
    answers = Answers(poisoned(*shape), torch.zeros(shape), ints([0, 20, 40]))
    keep_answers(state.pages, state.batch, tree, verdict, answers)
    answers = replace(answers, **{name: change(getattr(answers, name))})
    with pytest.raises(ValueError, match=rf"^answers\.{name} is"):
        keep_answers(state.pages, state.batch, tree, verdict, answers)


def test_logits():
    tokens, logprobs = poisoned(2, NUM_ANSWERS), torch.empty(2, NUM_ANSWERS)
    for wrong in (torch.zeros(2, 30).double(), torch.zeros(30, 2).t()):
        with pytest.raises(ValueError, match="^logits is"):
            likeliest_tokens(wrong, tokens, logprobs)
    with pytest.raises(ValueError, match="^tokens is"):
        likeliest_tokens(torch.zeros(3, 30), tokens, logprobs)
    with pytest.raises(ValueError, match="^logprobs is"):
        likeliest_tokens(torch.zeros(2, 30), tokens, logprobs.half())


def test_a_configuration_is_checked_once(state, monkeypatch):
    asked: list[str] = []

    def expect(name, *args, **kwargs):
        asked.append(name)
        return checks.expect(name, *args, **kwargs)

    monkeypatch.setattr(verify_kernels, "expect", expect)
    monkeypatch.setattr(verify_kernels, "_checked", checks.Checked())
    tree = random_draft(state, SHAPE, 0)
    verdict = REFERENCE.verify(tree, tree.tokens, 4)
    sampled = tree.tokens.contiguous()
    verify(tree, sampled, verdict)
    assert asked
    asked.clear()
    verify(tree, sampled.clone(), replace(verdict, path=verdict.path.clone()))
    assert not asked
    wide = torch.stack([sampled, sampled], 1)[:, 0]  # another stride
    for other in (sampled.long(), wide):
        verify(tree, other, verdict)
        assert asked
        asked.clear()
    for wrong in (tree.tokens.float(), tree.tokens[:, 1:], tree.tokens[:1]):
        for _ in range(2):
            with pytest.raises(ValueError, match="^sampled is"):
                verify(tree, wrong, verdict)


def test_configurations_are_forgotten_before_they_fill_memory():
    seen, sizes = checks.Checked(), range(2 * checks.Checked.MOST)
    for size in sizes:
        tensors = torch.zeros(3), torch.zeros(size)
        assert tensors not in seen
        seen.add(tensors)
        assert tensors in seen
    known = [size for size in sizes if (torch.zeros(3), torch.zeros(size)) in seen]
    assert known == list(sizes)[-len(known) :] and len(known) <= checks.Checked.MOST
