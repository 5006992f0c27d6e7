# SPDX-License-Identifier: Apache-2.0
"""Move the accepted nodes' K/V to where their tokens belong."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.arrays import array
from vllm_lookahead.numba_kernels.jit import kernel

# What a value of that many bytes is moved as; numpy has no bfloat16.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@kernel
def _slot(table, position, block_size):
    block = min(position // block_size, table.shape[0] - 1)
    return table[block] * block_size + position % block_size


@kernel
def _moves_kernel(
    block_table,  # [B, max_blocks] int32
    position,  # [B] int32
    path,  # [B, N] int32
    num_emitted,  # [B] int32
    block_size,
    slots,  # [2, B * (N-1)] int64 out: src, dst of what moves
):
    """Returns how many move."""
    n = 0
    for b in range(path.shape[0]):
        table, p = block_table[b], position[b]
        for depth in range(1, num_emitted[b]):
            if path[b, depth] != depth:
                slots[0, n] = _slot(table, p + path[b, depth], block_size)
                slots[1, n] = _slot(table, p + depth, block_size)
                n += 1
    return n


def compact(
    caches: list[torch.Tensor],
    batch: RequestBatch,
    verdict: Verdict,
    block_size: int,
) -> None:
    """`core.compact.compact`. Nothing moves where the first chain was accepted."""
    num_requests, max_emitted = verdict.path.shape
    slots = np.empty((2, num_requests * (max_emitted - 1)), np.int64)
    num_moved = _moves_kernel(
        array(batch.block_table, torch.int32),
        array(batch.position, torch.int32),
        array(verdict.path, torch.int32),
        array(verdict.num_emitted, torch.int32),
        block_size,
        slots,
    )
    if num_moved:
        move_slots(caches, *slots[:, :num_moved])


@kernel
def _move_kernel(
    cache,  # [num_blocks, block_size, h, d] integers, any strides
    src,  # [n] int64
    dst,  # [n] int64
):
    block_size = cache.shape[1]
    for i in range(src.shape[0]):
        src_block, src_offset = src[i] // block_size, src[i] % block_size
        dst_block, dst_offset = dst[i] // block_size, dst[i] % block_size
        for h in range(cache.shape[2]):
            for d in range(cache.shape[3]):
                value = cache[src_block, src_offset, h, d]
                cache[dst_block, dst_offset, h, d] = value


def move_slots(
    caches: Sequence[torch.Tensor], src: np.ndarray, dst: np.ndarray
) -> None:
    """Move K/V between slots: 4 us a cache, indexing in PyTorch takes 40."""
    for cache in caches:
        while cache.ndim < 4:
            cache = cache[..., None]
        _move_kernel(cache.view(_BITS[cache.element_size()]).numpy(), src, dst)
