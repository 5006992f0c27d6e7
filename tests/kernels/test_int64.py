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
    random_samples,
    random_state,
)
from tests.kernels.build import REFERENCE, AnySizeTritonOps
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
    # A short ring: this is about memory.
    near = replace(state.pages, ring=state.pages.ring[:, :8].contiguous())
    first = TOO_FAR // 32  # cells of tokens and of windows, 48 in a ring
    blocks = len(near.tokens)
    far = BlockPages(
        *(
            lend((first + blocks, *page.shape[1:]), torch.int32)
            for page in (near.tokens, near.ring, near.ring_count, near.window)
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

    tree = REFERENCE.propose(near, state.batch, state.g)
    assert_same_trees(tree, ops.propose(far, far_batch, state.g))
    sampled = random_samples(tree, shape.vocab, 0)
    verdict = REFERENCE.verify(tree, sampled, shape.n)
    REFERENCE.update(near, state.batch, tree, sampled, verdict)
    ops.update(far, far_batch, tree, sampled, verdict)
    assert_same()


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
