# SPDX-License-Identifier: Apache-2.0
"""Blocks so far out that their offsets do not fit in 32 bits.

Little of that memory is ever touched: a sparse file lends it to the CPU.
"""

from dataclasses import fields, replace

import pytest
import torch

from tests.core.build import Row, clone_pages, ints, make_batch
from tests.core.equivalence import (
    Shape,
    assert_same_trees,
    random_answers,
    random_hints,
    random_samples,
    random_state,
)
from tests.kernels.build import REFERENCE, AnySizeTritonOps
from vllm_lookahead.core.answers import likeliest_tokens
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.verify import Verdict

TOO_FAR = 2**31


@pytest.fixture
def lend(tmp_path):
    """Makes tensors of any size."""

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = torch.Size(shape).numel()
        try:
            if torch.cuda.is_available():
                return torch.empty(shape, dtype=dtype)
            path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            return torch.from_file(str(path), True, size, dtype=dtype).view(shape)
        except (RuntimeError, OSError) as error:
            pytest.skip(f"no room for {size} elements: {error}")

    return make


def test_pages(lend):
    shape = Shape(8, 5, 4, batch=2, block_size=32, num_blocks=2, vocab=3)
    state = random_state(shape, seed=4)
    # Short rings: this is about memory.
    near = replace(
        state.pages,
        ring=state.pages.ring[:, :8].contiguous(),
        answers=state.pages.answers[:, :8].contiguous(),
        answer_logprobs=state.pages.answer_logprobs[:, :8].contiguous(),
    )
    first = TOO_FAR // 32  # cells of tokens, windows and logprobs, more of rings
    blocks = len(near.tokens)
    far = BlockPages(
        *(
            lend((first + blocks, *page.shape[1:]), page.dtype)
            for page in vars(near).values()
        )
    )
    for f in fields(BlockPages):
        getattr(far, f.name)[first:] = getattr(near, f.name)
    far_batch = replace(state.batch, block_table=state.batch.block_table + first)
    ops = AnySizeTritonOps()

    def assert_same():
        for f in fields(BlockPages):
            page = getattr(far, f.name)[first:]
            assert torch.equal(page, getattr(near, f.name)), f.name

    slots, tokens = torch.arange(20, 100), torch.arange(80)
    before = clone_pages(near)
    REFERENCE.write_tokens(near, slots, tokens)
    ops.write_tokens(far, slots + first * 32, tokens)
    assert not torch.equal(near.tokens, before.tokens)
    assert_same()

    hints = random_hints(shape, shape.n, 0, gpu_noise)
    tree, _ = REFERENCE.draft(near, state.batch, hints, state.g)
    own, _ = ops.draft(far, far_batch, hints, state.g)
    assert_same_trees(tree, own)
    sampled = random_samples(tree, shape.vocab, 0)
    verdict = REFERENCE.verify(tree, sampled, shape.n)
    REFERENCE.update(near, state.batch, tree, sampled, verdict)
    ops.update(far, far_batch, tree, sampled, verdict)
    assert_same()
    answers = random_answers(tree, shape.vocab, 0)
    REFERENCE.keep_answers(near, state.batch, tree, verdict, answers)
    ops.keep_answers(far, far_batch, tree, verdict, answers)
    assert_same()


def test_rows_of_logits(lend):
    logits = lend((TOO_FAR + 100,), torch.float16)
    logits = logits.as_strided((3, 100), (TOO_FAR // 2, 1))
    near = torch.randn(3, 100).half()
    logits[:] = near
    tokens, logprobs = AnySizeTritonOps().likeliest_tokens(logits)
    expected = likeliest_tokens(near)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["BNHC", "BHNC", "HBNC"])
def test_compaction(lend, layout):
    """Far blocks; and, with the heads outermost, far heads."""
    heads = 3 if layout == "HBNC" else 1
    first = TOO_FAR // (8 * 33) // (heads - 1 or 1) + 1
    sizes = {"B": first + 4, "N": 8, "H": heads, "C": 33}
    cache = lend(tuple(sizes[d] for d in layout), torch.int8)
    cache = cache.permute([layout.index(d) for d in "BNHC"])
    near = torch.randint(-128, 128, (4, 8, heads, 33), dtype=torch.int8)
    cache[first:] = near
    path = ints([[0, 3, 9, 11, -1]])
    verdict = Verdict(path, path, ints([4]))
    batch = make_batch([Row([2, 0, 3], 6, 0)])
    REFERENCE.compact([near], batch, verdict, 8)
    batch.block_table += first
    AnySizeTritonOps().compact([cache], batch, verdict, 8)
    assert torch.equal(cache[first:], near)
