# SPDX-License-Identifier: Apache-2.0
"""Record in the pages the tokens whose K/V is final.

Reference: `core.write`.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import empty_pages, expect_pages

_checked = Checked()


@jit
def _write_tokens_kernel(
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_CELLS] int32
    ring_count_ptr,  # [num_blocks] int32
    window_ptr,  # [num_blocks, WINDOW_CELLS] int32
    answer_count_ptr,  # [num_blocks] int32
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
        answer_count_ptr,
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
        pages.answer_count,
        slots,
        tokens,
        n,
        BLOCK_SIZE=pages.block_size,
        RING_CELLS=pages.ring[0].numel(),
        WINDOW_CELLS=pages.window[0].numel(),
        BLOCK=block,
        num_warps=1,
    )
