# SPDX-License-Identifier: Apache-2.0
"""What kernels share about block pages: slots, empty pages, checks."""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.pages import CONTEXT, EMPTY, NUM_ANSWERS, BlockPages
from vllm_lookahead.triton_kernels.checks import expect

NO_TOKEN = tl.constexpr(EMPTY)


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
    answer_count_ptr,  # [num_blocks] int32
    block,  # [n] int64
    mask,  # [n], the blocks that have a new owner
    RING_CELLS: tl.constexpr,
    WINDOW_CELLS: tl.constexpr,
):
    """Nothing of a block's previous owner remains visible."""
    _fill_empty(ring_ptr, block, mask, RING_CELLS, 32)
    _fill_empty(window_ptr, block, mask, WINDOW_CELLS, 32)
    tl.store(ring_count_ptr + block, 0, mask=mask)
    tl.store(answer_count_ptr + block, 0, mask=mask)


def expect_pages(pages: BlockPages) -> None:
    """Check pages."""
    num_blocks, rows, _ = pages.window.shape
    expect("pages.tokens", pages.tokens, (num_blocks, -1))
    expect("pages.ring", pages.ring, (num_blocks, -1, rows + 2))
    expect("pages.ring_count", pages.ring_count, (num_blocks,))
    expect("pages.window", pages.window, (num_blocks, -1, -1))
    shape = num_blocks, -1, CONTEXT + NUM_ANSWERS
    expect("pages.answers", pages.answers, shape)
    shape = num_blocks, pages.answers.shape[1], NUM_ANSWERS
    expect("pages.answer_logprobs", pages.answer_logprobs, shape, torch.float32)
    expect("pages.answer_count", pages.answer_count, (num_blocks,))
