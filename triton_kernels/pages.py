# SPDX-License-Identifier: Apache-2.0
"""Block pages: record tokens, hand a block to its new owner.

Oracle: `core.pages.write_tokens`.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect
from vllm_lookahead.triton_kernels.jit import jit

NO_TOKEN = tl.constexpr(EMPTY)

_checked = Checked()


@triton.jit
def load_slot(
    block_table_ptr,  # [max_blocks] int32 of this request
    position,
    mask,
    BLOCK_SIZE: tl.constexpr,
):
    """Physical slot of each position, int64; slot of block 0 where masked out."""
    block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=mask, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def _fill_empty(
    page_ptr,  # [num_blocks, CELLS] int32
    block,  # [n] int64
    mask,  # [n]
    CELLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    cell = tl.arange(0, CHUNK)
    for start in range(0, CELLS, CHUNK):
        inside = start + cell < CELLS
        tl.store(
            page_ptr + block[:, None] * CELLS + start + cell[None, :],
            NO_TOKEN,
            mask=mask[:, None] & inside[None, :],
        )


@triton.jit
def empty_pages(
    ring_ptr,  # [num_blocks, RING_CELLS] int32
    ring_count_ptr,  # [num_blocks] int32
    window_ptr,  # [num_blocks, WINDOW_CELLS] int32
    block,  # [n] int64
    mask,  # [n], the blocks that have a new owner
    RING_CELLS: tl.constexpr,
    WINDOW_CELLS: tl.constexpr,
):
    """Nothing of a block's previous owner remains visible."""
    _fill_empty(ring_ptr, block, mask, RING_CELLS, 32)
    _fill_empty(window_ptr, block, mask, WINDOW_CELLS, 32)
    tl.store(ring_count_ptr + block, 0, mask=mask)


@jit
def _write_tokens_kernel(
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_CELLS] int32
    ring_count_ptr,  # [num_blocks] int32
    window_ptr,  # [num_blocks, WINDOW_CELLS] int32
    slots_ptr,  # [n] int64
    new_tokens_ptr,  # [n]
    n,
    BLOCK_SIZE: tl.constexpr,
    RING_CELLS: tl.constexpr,
    WINDOW_CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + i, mask=i < n, other=-1)
    keep = slot >= 0
    token = tl.load(new_tokens_ptr + i, mask=keep, other=0)
    tl.store(tokens_ptr + slot, token, mask=keep)
    fresh = keep & (slot % BLOCK_SIZE == 0)
    empty_pages(
        ring_ptr,
        ring_count_ptr,
        window_ptr,
        slot // BLOCK_SIZE,
        fresh,
        RING_CELLS,
        WINDOW_CELLS,
    )


def write_tokens(pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Record tokens in the slots that now hold their K/V.

    Args:
        pages: written in place; a block whose first slot is written is emptied.
        slots: [n] int64, physical slots; negative ones are skipped.
        tokens: [n] int32 or int64.
    """
    n = slots.shape[0]
    tensors = *vars(pages).values(), slots, tokens
    if tensors not in _checked:
        expect_pages(pages)
        expect("slots", slots, (n,), torch.int64)
        expect("tokens", tokens, (n,), *INTEGERS)
        _checked.add(tensors)
    if not n:
        return
    block = 32
    _write_tokens_kernel[(triton.cdiv(n, block),)](
        pages.tokens,
        pages.ring,
        pages.ring_count,
        pages.window,
        slots,
        tokens,
        n,
        BLOCK_SIZE=pages.block_size,
        RING_CELLS=pages.ring[0].numel(),
        WINDOW_CELLS=pages.window[0].numel(),
        BLOCK=block,
        num_warps=1,
    )


def expect_pages(pages: BlockPages) -> None:
    """Check pages."""
    num_blocks, rows, _ = pages.window.shape
    expect("pages.tokens", pages.tokens, (num_blocks, -1))
    expect("pages.ring", pages.ring, (num_blocks, -1, rows + 2))
    expect("pages.ring_count", pages.ring_count, (num_blocks,))
    expect("pages.window", pages.window, (num_blocks, -1, -1))
