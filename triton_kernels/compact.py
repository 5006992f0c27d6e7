# SPDX-License-Identifier: Apache-2.0
"""Move the accepted nodes' K/V to where their depth says, in every layer.

Reference: `core.compact`. One launch for all layers of one geometry. It moves bits: K/V
of any type, in the widest integers that fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.checks import Checked, expect, expect_batch
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import load_slot

_checked = Checked()
_INTEGERS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@dataclass(frozen=True)
class LayerCaches:
    """The K/V caches of all layers that share a geometry, as a kernel sees them.

    Attributes:
        pointers: [L] int64, where each cache starts.
        block_size: slots of a block.
        num_heads: second to last dimension of a cache.
        width: integers of a head in a slot.
        strides: of block, slot, head and element, in integers.
        item: bytes of an integer.
    """

    pointers: torch.Tensor
    block_size: int
    num_heads: int
    width: int
    strides: tuple[int, int, int, int]
    item: int

    @classmethod
    def group(cls, caches: Sequence[torch.Tensor]) -> list["LayerCaches"]:
        """Put caches of equal geometry together. Call it once: it copies pointers.

        Args:
            caches: views [num_blocks, block_size, heads, width], any strides. K and
                V may be two of them, or lie side by side in one `width`: vLLM's
                cache of a layer [num_blocks, heads, block_size, 2 * head_size] is
                one view, `cache.transpose(1, 2)`.
        """
        groups: dict[tuple, list[torch.Tensor]] = {}
        for cache in caches:
            if cache.dim() != 4:
                raise ValueError(
                    f"a K/V cache is {tuple(cache.shape)}; the kernel takes a view "
                    "[num_blocks, block_size, heads, width]"
                )
            groups.setdefault(_geometry(cache), []).append(cache)
        return [
            cls(
                torch.tensor(
                    [cache.data_ptr() for cache in members],
                    dtype=torch.int64,
                    device=members[0].device,
                ),
                *geometry,
            )
            for geometry, members in groups.items()
        ]


def _geometry(cache: torch.Tensor) -> tuple:
    """The fields of `LayerCaches` after `pointers`."""
    _, block_size, num_heads, width = cache.shape
    strides = cache.stride()
    item = cache.element_size()
    # Heads that lie side by side are one: fewer, longer runs.
    if strides[2] == width and strides[3] == 1:
        num_heads, width, strides = 1, num_heads * width, (*strides[:2], 0, 1)
    for wide in _INTEGERS:
        ratio = wide // item
        if ratio <= 1:
            break
        aligned = (width, cache.data_ptr() // item, *strides[:3])
        if strides[3] == 1 and not any(n % ratio for n in aligned):
            width //= ratio
            strides = (*(n // ratio for n in strides[:3]), 1)
            item = wide
            break
    return block_size, num_heads, width, strides, item


@jit
def _compact_kernel(
    caches_ptr,  # [L] int64: [num_blocks, BLOCK_SIZE, heads, WIDTH] each
    path_ptr,  # [B, N] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    stride_table,
    stride_block,
    stride_slot,
    stride_head,
    stride_element,
    N: tl.constexpr,
    TABLE_BLOCK_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_MOVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    depth = tl.arange(0, BLOCK_MOVES) + 1
    node = tl.load(path_ptr + b * N + depth, mask=depth < N, other=-1)
    moves = node > depth  # what is accepted where it lies stays there
    if tl.max(moves.to(tl.int32), 0) == 0:
        return

    position = tl.load(position_ptr + b)
    table_ptr = block_table_ptr + b * stride_table
    source = load_slot(table_ptr, position + node, moves, TABLE_BLOCK_SIZE)
    target = load_slot(table_ptr, position + depth, moves, TABLE_BLOCK_SIZE)
    source = source // BLOCK_SIZE * stride_block + source % BLOCK_SIZE * stride_slot
    target = target // BLOCK_SIZE * stride_block + target % BLOCK_SIZE * stride_slot

    layer = tl.program_id(1)
    cache_ptr = tl.load(caches_ptr + layer).to(tl.pointer_type(INTEGER))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = moves[:, None] & (i < NUM_HEADS * WIDTH)[None, :]
    i = i.to(tl.int64)  # a head's stride may span all blocks
    offset = i // WIDTH * stride_head + i % WIDTH * stride_element
    values = tl.load(cache_ptr + source[:, None] + offset[None, :], mask=mask)
    # One node's target may be another's source: all threads read before any writes.
    tl.debug_barrier()
    tl.store(cache_ptr + target[:, None] + offset[None, :], values, mask=mask)


def compact(
    caches: LayerCaches, batch: RequestBatch, verdict: Verdict, block_size: int
) -> None:
    """Move K/V in place, in every layer of a group.

    Args:
        caches: one group of `LayerCaches.group`.
        batch: the requests as they were when the trees were built.
        verdict: accepted nodes ascend and none lies below its depth.
        block_size: tokens per block of the block table. The caches' own blocks may
            be smaller, a whole number of them to one of the table.
    """
    b, n = batch.block_table.shape[0], verdict.path.shape[1]
    tensors = *vars(batch).values(), caches.pointers, verdict.path
    if tensors not in _checked:
        expect_batch(batch)
        expect("verdict.path", verdict.path, (b, n))
        expect("cache pointers", caches.pointers, (-1,), torch.int64)
        _checked.add(tensors)
    if block_size % caches.block_size:
        raise ValueError(
            f"blocks of {block_size} tokens are no whole number of the cache's "
            f"{caches.block_size}"
        )
    if not b or n < 2:
        return
    integers = caches.num_heads * caches.width
    block_moves = triton.next_power_of_2(n - 1)
    # A program's moves wait in its registers: 32 integers per lane of 4 warps.
    block = min(triton.next_power_of_2(integers), max(64, 4096 // block_moves))
    num_layers = caches.pointers.shape[0]
    _compact_kernel[(triton.cdiv(integers, block), num_layers, b)](
        caches.pointers,
        verdict.path,
        batch.block_table,
        batch.position,
        batch.block_table.stride(0),
        *caches.strides,
        N=n,
        TABLE_BLOCK_SIZE=block_size,
        BLOCK_SIZE=caches.block_size,
        NUM_HEADS=caches.num_heads,
        WIDTH=caches.width,
        INTEGER=_INTEGERS[caches.item],
        BLOCK_MOVES=block_moves,
        BLOCK=block,
        num_warps=4,
    )
