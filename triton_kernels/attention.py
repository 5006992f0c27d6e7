# SPDX-License-Identifier: Apache-2.0
"""Tree attention over a paged K/V cache.

A tree's own K/V lies in the slots right after its context. Tiles of context are
seen by every row; the tiles from the one that holds the context's end onwards are
masked by the packed ancestor bits. Query heads that share a K/V head share a tile
of rows. Long contexts are split; a second kernel merges the parts by their LSE.

Everything about a launch is a maximum known on the host, so that a CUDA graph can
replay it for other trees and longer contexts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from vllm_lookahead.triton_kernels.attention_config import (
    MAX_SPLITS,
    SplitScratch,
    TreeBatch,
    _config,
    default_splits,
    target_arch,
)
from vllm_lookahead.triton_kernels.attention_kernel import (
    LOG2_E,
    merge_splits_kernel,
    tree_attention_kernel,
)
from vllm_lookahead.triton_kernels.checks import Checked, expect

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_attended, _merged = Checked(), Checked()


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: TreeBatch,
    out: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    sliding_window: int = 0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    scratch: SplitScratch | None = None,
    num_splits: int | None = None,
    prior_lse: torch.Tensor | None = None,
) -> None:
    """Attention of tree nodes over their context, their ancestors and themselves.

    Args:
        q: [N, Hq, D] float16, bfloat16 or float32, the rows of all requests.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D] of q's dtype or
            float8_e4m3fn; any strides, if the same for both and 1 for the last.
        batch: the trees; no slot at or beyond p plus a tree's size is read.
        out: [N, Hq, D] of q's dtype; rows of no request are left alone.
        scale: of q @ k, before softmax.
        softcap: scores become softcap * tanh(score / softcap), if positive.
        sliding_window: a node sees positions less than this far behind its own, if
            positive. Blocks all of whose slots are out of reach are not read.
        k_scale, v_scale: [1] float32, factors of an fp8 cache.
        scratch: for the splits, as many as there is room for.
        num_splits: parts of each context, instead of what suits the GPU.
        prior_lse: [Hq, N] float32, natural log. Then `out` and this already hold
            attention over the contexts, and only the trees are added.
    """
    num_rows, num_heads, head_size = q.shape
    num_requests, block_size = batch.context_lens.shape[0], k_cache.shape[1]
    num_kv_heads = k_cache.shape[2]
    tensors = q, k_cache, v_cache, *(scratch or ()), out
    if tensors not in _attended:
        _check(q, k_cache, v_cache, out)
        if scratch is not None:
            partial, lse = scratch
            expect("scratch.partial", partial, (-1, head_size), torch.float32)
            expect("scratch.lse", lse, (partial.shape[0],), torch.float32)
        _attended.add(tensors)
    if scale <= 0:
        raise ValueError(f"scale is {scale}; the kernel takes positive scales")
    has_prior, fp8 = prior_lse is not None, k_cache.dtype == torch.float8_e4m3fn
    if fp8 and (k_scale is None or v_scale is None):
        raise ValueError("an fp8 cache needs k_scale and v_scale")
    if sliding_window and batch.depths is None:
        raise ValueError("a sliding window needs the nodes' depths")
    if has_prior and (sliding_window or fp8):
        raise ValueError(
            "prior_lse goes with neither a sliding window nor an fp8 cache"
        )
    if not num_rows:
        return

    group = num_heads // num_kv_heads
    arch, item, packed = target_arch(), q.element_size(), batch.max_query_len * group
    # The tree alone is a short loop: rather more programs.
    most_rows = min(32, packed) if has_prior else packed
    config = _config(head_size, most_rows, arch, item)
    row_tiles = triton.cdiv(packed, config.block_m)
    target, lse, most = out, prior_lse, 1
    if scratch is not None and not has_prior:
        most = max(1, scratch.lse.shape[0] // (num_rows * num_heads))
    if num_splits is None:
        longest = batch.max_context_len or batch.block_table.shape[1] * block_size
        # Of many requests few can be wide: the rows say how many tiles have any.
        tiles = num_requests + num_rows * group // config.block_m
        tiles = min(tiles, row_tiles * num_requests)
        num_splits = default_splits(tiles * num_kv_heads, config, longest)
    num_splits = min(num_splits, most)
    if num_splits > 1 and scratch is not None:
        target, lse = scratch.partial, scratch.lse

    tree_attention_kernel[(row_tiles, num_kv_heads * num_splits, num_requests)](
        q,
        k_cache,
        v_cache,
        target,
        lse,
        batch.query_start_loc,
        batch.context_lens,
        batch.block_table,
        batch.ancestor_bits,
        batch.depths if sliding_window else None,
        k_scale if fp8 else None,
        v_scale if fp8 else None,
        scale * LOG2_E.value,
        num_rows,
        num_splits,
        q.stride(0),
        q.stride(1),
        num_rows * num_heads * head_size,  # of a split
        num_heads * head_size if num_splits > 1 else out.stride(0),
        head_size if num_splits > 1 else out.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        batch.block_table.stride(0),
        batch.ancestor_bits.stride(0),
        batch.ancestor_bits.stride(1),
        batch.depths.stride(0) if sliding_window else 0,
        SPLIT=num_splits > 1,
        NUM_HEADS=num_heads,
        GROUP=group,
        PRIOR=has_prior,
        KV_SCALES=fp8,
        SOFTCAP=softcap,
        WINDOW=sliding_window,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        UPCAST=triton.knobs.runtime.interpret,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_splits > 1 and scratch is not None:
        merge_splits(scratch, out, batch.query_start_loc, num_splits)


def merge_splits(
    scratch: SplitScratch,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_splits: int,
) -> None:
    """Merge the parts of a split launch by their LSE.

    Args:
        scratch: where they are, [num_splits, N, Hq] of them.
        out: [N, Hq, D], rows of no request are left alone.
        query_start_loc: [B+1] int32.
        num_splits: at least 2.
    """
    num_rows, num_heads, head_size = out.shape
    tensors = query_start_loc, out
    if tensors not in _merged:
        expect("out", out, (-1, -1, -1), *FLOATS, rows_apart=True)
        expect("query_start_loc", query_start_loc, (-1,))
        _merged.add(tensors)
    if scratch.lse.shape[0] < num_splits * num_rows * num_heads:
        raise ValueError(f"scratch is too small for {num_splits} splits of {num_rows}")
    merge_splits_kernel[(num_rows, num_heads)](
        scratch.partial,
        scratch.lse,
        out,
        query_start_loc,
        query_start_loc.shape[0] - 1,
        num_splits,
        out.stride(0),
        out.stride(1),
        BLOCK_S=triton.next_power_of_2(num_splits),
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        num_warps=1,
    )


def warm_up(
    attend: Callable[[TreeBatch], object],
    batch: TreeBatch,
    out: torch.Tensor,
    group: int,
    scratch: SplitScratch | None,
) -> None:
    """Compile every variant of a launch before a request waits for it.

    Args:
        attend: calls `tree_attention` as the engine does.
        batch: of one request without rows; the widest tree and the longest context.
        out: [1, Hq, D], as the engine's.
        group: query heads per K/V head.
        scratch: the engine's.
    """
    for rows in (16, 32, 64, 128):
        size = min(batch.max_query_len, max(1, rows // group))
        for longest in (1, batch.max_context_len):
            attend(replace(batch, max_query_len=size, max_context_len=longest))
    splits = 2
    while scratch is not None and splits <= MAX_SPLITS:
        merge_splits(scratch, out, batch.query_start_loc, splits)
        splits *= 2


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if q.dtype not in FLOATS or k_cache.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"q is {q.dtype} and the cache {k_cache.dtype}; q must be one of {FLOATS}"
            " and the cache the same, or float8_e4m3fn (view a uint8 cache as that)"
        )
    n, hq, d = q.shape
    hkv = k_cache.shape[2]
    expect("q", q, (n, hq, d), q.dtype, rows_apart=True)
    expect("out", out, (n, hq, d), q.dtype, rows_apart=True)
    expect("k_cache", k_cache, (-1, -1, hkv, d), k_cache.dtype, rows_apart=True)
    if (v_cache.dtype, v_cache.shape, v_cache.stride()) != (
        k_cache.dtype,
        k_cache.shape,
        k_cache.stride(),
    ):
        raise ValueError("k_cache and v_cache differ in dtype, shape or strides")
    if hq % hkv or d > 256:
        raise ValueError(
            f"{hq} query heads on {hkv} K/V heads of {d}: the kernel takes a multiple "
            "of the K/V heads, and head sizes to 256"
        )
