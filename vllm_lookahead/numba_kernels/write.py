# SPDX-License-Identifier: Apache-2.0
"""Record in the pages the tokens whose K/V is final."""

import torch

from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.numba_kernels.arrays import array, page_arrays
from vllm_lookahead.numba_kernels.jit import kernel


@kernel
def _write_token(tokens, ring, ring_count, window, answer_count, block, offset, token):
    tokens[block, offset] = token
    if offset == 0:  # a new owner: nothing of the previous one remains
        ring[block], ring_count[block], window[block] = EMPTY, 0, EMPTY
        answer_count[block] = 0


@kernel
def _write_tokens_kernel(
    tokens,  # [num_blocks, block_size] int32
    ring,  # [num_blocks, ring_size, N+1] int32
    ring_count,  # [num_blocks] int32
    window,  # [num_blocks, N-1, W] int32
    answer_count,  # [num_blocks] int32
    slots,  # [n] int64
    values,  # [n] int32
):
    block_size = tokens.shape[1]
    for i in range(slots.shape[0]):
        if slots[i] >= 0:
            block, offset = slots[i] // block_size, slots[i] % block_size
            _write_token(
                tokens, ring, ring_count, window, answer_count, block, offset, values[i]
            )


def write_tokens(pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """`core.write.write_tokens`."""
    *known, _, _, answer_count = page_arrays(pages)
    _write_tokens_kernel(
        *known,
        answer_count,
        array(slots, torch.int64),
        array(tokens.int(), torch.int32),
    )
