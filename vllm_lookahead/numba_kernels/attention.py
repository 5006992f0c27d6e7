# SPDX-License-Identifier: Apache-2.0
"""Attention of draft trees over a CPU's paged K/V cache.

vLLM's C++ kernels attend in causal order only. This one lets a node see the context,
its ancestors and itself, and takes every sum in the order in which vLLM's `vec` kernel
would take it for the same tokens in a row (csrc/cpu/cpu_attn_impl.hpp `apply_softmax`,
cpu_attn_vec.hpp `TileGemm82`, cpu_arch_macros.h DEFINE_FAST_EXP). So a node's output is
that of plain decoding to the last bit, wherever in the tree it lies, while a context
fits one of that kernel's tiles: (L2 / 2 - 64 * head_size) / 32 tokens, 16k for 1 MiB.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_lookahead.numba_kernels.jit import kernel

LANES = 16  # of a vector of float32, and of vLLM's sums
_TILE_ROWS = 4  # with 16 lanes, as many as AVX2 has registers for
_MAX_ROWS = 32  # whose scores are held at once

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, LANES)
# What K/V may be held as; kernels are told by the index.
DTYPES = torch.float32, torch.bfloat16, torch.float16


def _fma(builder: Any, kind: Any, suffix: str, *operands: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.{suffix}"
    )
    return builder.call(function, operands)


def _load_vector(builder: Any, address: Any, dtype: torch.dtype) -> Any:
    """16 elements of K or V, widened."""

    def load(element: Any) -> Any:
        vector = ir.VectorType(element, LANES)
        pointer = builder.inttoptr(address, vector.as_pointer())
        return builder.load(pointer, align=2)

    if dtype == torch.float32:
        return load(_F32)
    if dtype == torch.float16:
        return builder.fpext(load(ir.HalfType()), _FLOATS)
    wide = ir.VectorType(_I32, LANES)
    bits = builder.shl(builder.zext(load(_I16), wide), ir.Constant(wide, [16] * LANES))
    return builder.bitcast(bits, _FLOATS)


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, first, lanes)


@intrinsic
def _add_product(typingctx, c, a, b, depth, stride_c, stride_a, stride_b, dtype):
    """c[4, 16] += a[4, depth] @ b[depth, 16], one product after the other.

    Addresses of c and a, float32, and of b, of `DTYPES[dtype]`; strides of rows, in
    elements.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        c, a, b, depth, stride_c, stride_a, stride_b, dtype = args
        floats, vectors = _F32.as_pointer(), _FLOATS.as_pointer()

        def row(address: Any, stride: Any, r: int) -> Any:
            offset = builder.mul(stride, _I64(4 * r))
            return builder.add(address, offset)

        outs = [
            builder.inttoptr(row(c, stride_c, r), vectors) for r in range(_TILE_ROWS)
        ]
        lefts = [
            builder.inttoptr(row(a, stride_a, r), floats) for r in range(_TILE_ROWS)
        ]
        for index, kind in enumerate(DTYPES):
            with builder.if_then(builder.icmp_signed("==", dtype, _I64(index))):
                sums = [cgutils.alloca_once(builder, _FLOATS) for _ in outs]
                for total, out in zip(sums, outs, strict=True):
                    builder.store(builder.load(out, align=4), total)
                step = builder.mul(stride_b, _I64(kind.itemsize))
                with cgutils.for_range(builder, depth) as loop:
                    at = builder.add(b, builder.mul(loop.index, step))
                    right = _load_vector(builder, at, kind)
                    for total, left in zip(sums, lefts, strict=True):
                        value = builder.load(builder.gep(left, [loop.index]))
                        operands = _splat(builder, value), right, builder.load(total)
                        added = _fma(builder, _FLOATS, "v16f32", *operands)
                        builder.store(added, total)
                for total, out in zip(sums, outs, strict=True):
                    builder.store(builder.load(total), out, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), codegen


@intrinsic
def _fused(typingctx, x, y, z):
    """x * y + z, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fma(builder, _F32, "f32", *args)

    return types.float32(*[types.float32] * 3), codegen


@intrinsic
def _floor(typingctx, x):
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_F32, [_F32])
        floor = cgutils.get_or_insert_function(builder.module, kind, "llvm.floor.f32")
        return builder.call(floor, args)

    return types.float32(types.float32), codegen


@kernel
def _exp(x, powers, bits):
    """exp(x) in place, as vLLM's `fast_exp`; x is not positive.

    `powers` and `bits` are one scratch array of float32, seen as floats and as int32.
    """
    lowest = np.float32(-87.3365478515625)
    for i in range(x.shape[0]):
        clamped = max(x[i], lowest)
        n = _floor(_fused(clamped, np.float32(1.4426950216293335), np.float32(0.5)))
        y = _fused(-n, np.float32(0.6931471824645996), clamped)
        p = _fused(y, np.float32(0.00828929059), np.float32(0.0418978221))
        p = _fused(y, p, np.float32(0.166676521))
        p = _fused(y, p, np.float32(0.499991506))
        p = _fused(y, p, np.float32(0.999999701))
        exponent = (np.int32(n) + np.int32(126)) << np.int32(23)
        bits[i] = np.int32(0) if x[i] < lowest else exponent
        x[i] = _fused(y, p, np.float32(1))
    for i in range(x.shape[0]):
        x[i] = x[i] * powers[i] * np.float32(2)


@kernel
def _softmax(
    scores,  # [slots] float32 in; out: exp(score - max), 0 where unseen
    num_context,  # slots before the tree
    sees,  # [T] bool, nodes that the row sees
    depths,  # [T] int32
    powers,  # scratch of `_exp`, as `bits`
    bits,
    lanes,  # [16] float32 scratch
):
    """Returns the sum, taken as if what the row sees lay in consecutive slots."""
    whole = num_context // LANES * LANES
    for j in range(sees.shape[0]):
        if not sees[j]:
            scores[num_context + j] = -np.inf
    lanes[:] = -np.inf
    for first in range(0, whole, LANES):
        for i in range(LANES):
            x = scores[first + i]
            lanes[i] = x if x > lanes[i] else lanes[i]
    top = np.max(lanes)
    for j in range(whole, scores.shape[0]):
        top = max(top, scores[j])
    for j in range(scores.shape[0]):
        scores[j] -= top
    _exp(scores, powers, bits)
    lanes[:] = 0
    for first in range(0, whole, LANES):
        for i in range(LANES):
            lanes[i] += scores[first + i]
    for j in range(whole, num_context):
        lanes[j % LANES] += scores[j]
    for j in range(sees.shape[0]):
        if sees[j]:
            lanes[(num_context + depths[j]) % LANES] += scores[num_context + j]
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@kernel
def _attend(
    query,  # [n, num_heads, head_size] float32
    scale,  # of the softmax, float32
    cache,  # address of [num_blocks, num_kv_heads, 2, block_size * head_size]
    dtype,  # of the cache, as in DTYPES
    item_size,
    num_kv_heads,
    block_size,
    first_row,  # [b] int64, first row of each tree in `query` and `out`
    num_nodes,  # [b] int32
    position,  # [b] int32, slots before the tree
    block_table,  # [b, max_blocks] int32
    sees,  # [b, T, T] bool
    depths,  # [b, T] int32
    out,  # [n, num_heads, head_size] float32, out
):
    num_heads, head_size = query.shape[1:]
    group = num_heads // num_kv_heads
    half = block_size * head_size * item_size  # bytes of a block's K, or V
    lanes = np.empty(LANES, np.float32)
    for b in range(num_nodes.shape[0]):
        nodes, slots = num_nodes[b], position[b] + num_nodes[b]
        num_blocks = -(-slots // block_size)
        stride = num_blocks * block_size
        tiled = -(-nodes * group // _TILE_ROWS) * _TILE_ROWS
        num_rows = min(_MAX_ROWS, tiled)
        q = np.zeros((num_rows, head_size), np.float32)
        scores = np.empty((num_rows, stride), np.float32)
        summed = np.empty((num_rows, head_size), np.float32)
        totals = np.empty(num_rows, np.float32)
        powers = np.empty(slots, np.float32)
        at_q, at_scores = q.ctypes.data, scores.ctypes.data
        at_summed = summed.ctypes.data
        for head in range(num_kv_heads):
            for first in range(0, nodes * group, num_rows):
                rows = min(num_rows, nodes * group - first)
                for r in range(rows):
                    node, member = divmod(first + r, group)
                    q[r] = query[first_row[b] + node, head * group + member] * scale
                scores[:] = 0
                summed[:] = 0
                for i in range(num_blocks):
                    block = np.int64(block_table[b, i])
                    keys = cache + (block * num_kv_heads + head) * 2 * half
                    before = i * block_size
                    for column in range(0, min(block_size, slots - before), LANES):
                        for r in range(0, rows, _TILE_ROWS):
                            _add_product(
                                at_scores + 4 * (r * stride + before + column),
                                at_q + 4 * r * head_size,
                                keys + column * item_size,
                                head_size,
                                stride,
                                head_size,
                                block_size,
                                dtype,
                            )
                for r in range(rows):
                    totals[r] = _softmax(
                        scores[r, :slots],
                        position[b],
                        sees[b, (first + r) // group, :nodes],
                        depths[b],
                        powers,
                        powers.view(np.int32),
                        lanes,
                    )
                for i in range(num_blocks):
                    block = np.int64(block_table[b, i])
                    values = cache + ((block * num_kv_heads + head) * 2 + 1) * half
                    before = i * block_size
                    # Slots beyond the tree are not read: a NaN there would spread.
                    here = min(block_size, slots - before)
                    for column in range(0, head_size, LANES):
                        for r in range(0, rows, _TILE_ROWS):
                            _add_product(
                                at_summed + 4 * (r * head_size + column),
                                at_scores + 4 * (r * stride + before),
                                values + column * item_size,
                                here,
                                head_size,
                                stride,
                                head_size,
                                dtype,
                            )
                for r in range(rows):
                    node, member = divmod(first + r, group)
                    share = np.float32(1.0 / totals[r])
                    target = out[first_row[b] + node, head * group + member]
                    for i in range(head_size):
                        target[i] = share * summed[r, i]


@dataclass
class TreeRows:
    """The draft trees of a step, where they lie in its flat batch.

    Attributes:
        first_row: [b] int64, row of each root; the tree's other rows follow.
        num_nodes: [b] int32.
        position: [b] int32, p of each, also the slots before the tree.
        block_table: [b, max_blocks] int32, physical block of each logical one.
        sees: [b, T, T] bool, as `core.mask.ancestors`.
        depths: [b, T] int32.
        covers_batch: whether the batch has no other rows.
    """

    first_row: np.ndarray
    num_nodes: np.ndarray
    position: np.ndarray
    block_table: np.ndarray
    sees: np.ndarray
    depths: np.ndarray
    covers_batch: bool


def _check(query: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor) -> None:
    """Raise for shapes with which the kernel would leave the tensors."""
    if kv_cache.dtype not in DTYPES or not kv_cache.is_contiguous():
        raise TypeError(
            f"expected a contiguous K/V cache of one of {DTYPES}, got "
            f"{kv_cache.dtype} with strides {kv_cache.stride()}"
        )
    _, num_kv_heads, block_size, both = kv_cache.shape
    _, num_heads, head_size = query.shape
    if (
        out.shape != query.shape
        or both != 2 * head_size
        or num_heads % num_kv_heads
        or block_size % LANES
        or head_size % LANES
    ):
        raise ValueError(
            f"expected heads and blocks in multiples of {LANES} elements and slots, "
            f"and one size of heads, got query {[*query.shape]}, kv_cache "
            f"{[*kv_cache.shape]} and out {[*out.shape]}"
        )


def tree_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    trees: TreeRows,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend every tree over its context and itself, on one thread.

    Args:
        query: [num_rows, num_heads, head_size]; head_size a multiple of 16.
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] of one of
            `DTYPES`, a block packed as vLLM's `vec` kernels do: K as [head_size,
            block_size], then V as [block_size, head_size].
        trees: the rows to attend.
        scale: softmax scale.
        out: as `query`; the rows of `trees` are written.
    """
    _check(query, kv_cache, out)
    rows = torch.empty(out.shape) if trees.covers_batch else out.float().contiguous()
    _attend(
        query.float().contiguous().numpy(),
        np.float32(scale),
        kv_cache.data_ptr(),
        DTYPES.index(kv_cache.dtype),
        kv_cache.element_size(),
        *kv_cache.shape[1:3],
        trees.first_row,
        trees.num_nodes,
        trees.position,
        trees.block_table,
        trees.sees,
        trees.depths,
        rows.numpy(),
    )
    out.copy_(rows)
