# SPDX-License-Identifier: Apache-2.0
"""A bf16 linear layer over a few rows, for CPUs whose BLAS has none.

Without AVX-512, PyTorch computes a bf16 product row by row and reads the weight
anew for each, so that a tree of 8 tokens costs 8 plain tokens. Here the weight is
read and widened once for up to 8 rows. Every sum is taken in the order of ATen's
`dot_with_fp32_arith` (native/cpu/ReducedPrecisionFloatGemvFastPathKernel.cpp), so
the result is the same to the last bit.
"""

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_lookahead.numba_kernels.jit import kernel

_LANES = 8  # of a vector of float32
_REGISTERS = 8  # partial sums that ATen keeps
_MAX_ROWS = 8

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_FLOATS = ir.VectorType(_F32, _LANES)
_INTS = ir.VectorType(_I32, _LANES)
_SHORTS = ir.VectorType(_I16, _LANES)


def _accumulate(builder: Any, weight: Any, x: Any, index: Any, sums: list[Any]) -> None:
    """sums[row] += weight[index : index + 8] * x[index // 8, row]"""
    fma_type = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fma = cgutils.get_or_insert_function(builder.module, fma_type, "llvm.fma.v8f32")
    pointer = builder.bitcast(builder.gep(weight, [index]), _SHORTS.as_pointer())
    bits = builder.zext(builder.load(pointer, align=2), _INTS)
    wide = builder.bitcast(
        builder.shl(bits, ir.Constant(_INTS, [16] * _LANES)), _FLOATS
    )
    first = builder.mul(builder.udiv(index, _I64(_LANES)), _I64(len(sums)))
    for row, total in enumerate(sums):
        vector = builder.gep(x, [builder.add(first, _I64(row))])
        operands = [builder.load(vector, align=4), wide, builder.load(total)]
        builder.store(builder.call(fma, operands), total)


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The lanes of 8 vectors summed, in the order of `vec_reduce_all`."""
    for step in (4, 2, 1):
        low = [i for i in range(2 * _LANES) if not i & step]
        high = [i + step for i in low]
        lows, highs = (ir.Constant(_INTS, lanes) for lanes in (low, high))
        pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
        vectors = [
            builder.fadd(
                builder.shuffle_vector(*pair, lows),
                builder.shuffle_vector(*pair, highs),
            )
            for pair in pairs
        ]
    return vectors[0]


def _round(builder: Any, values: Any) -> Any:
    """float32 as bf16 bits, half to even."""

    def constant(value: int) -> ir.Constant:
        return ir.Constant(_INTS, [value] * _LANES)

    bits = builder.bitcast(values, _INTS)
    even = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, constant(0x7FFF)), even)
    is_nan = builder.fcmp_unordered("uno", values, values)
    rounded = builder.select(is_nan, constant(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, constant(16)), _SHORTS)


def _dot_rows(builder: Any, rows: int, args: list[Any]) -> None:
    """`_dot` for a fixed number of rows."""
    weight, x, size, bias, out = args
    zeros = ir.Constant(_FLOATS, [0.0] * _LANES)
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(rows)]
    partial = [cgutils.alloca_once(builder, _FLOATS, _REGISTERS) for _ in range(rows)]
    unrolled = _LANES * _REGISTERS
    aligned = builder.and_(size, _I64(-unrolled))
    loop = functools.partial(cgutils.for_range_slice, builder)

    def clear() -> None:
        for total in sums:
            builder.store(zeros, total)

    def all_rows(vectors: list[Any]) -> Any:
        return _sum_lanes(builder, vectors + [zeros] * (_MAX_ROWS - rows))

    with cgutils.for_range(builder, _I64(_REGISTERS)) as register:
        clear()
        start = builder.mul(register.index, _I64(_LANES))
        with loop(start, aligned, _I64(unrolled)) as (index, _):
            _accumulate(builder, weight, x, index, sums)
        for total, registers in zip(sums, partial, strict=True):
            slot = builder.gep(registers, [register.index])
            builder.store(builder.load(total), slot)
    mains = []
    for registers in partial:
        terms = [
            builder.load(builder.gep(registers, [_I64(i)])) for i in range(_REGISTERS)
        ]
        while len(terms) > 1:
            half = len(terms) // 2
            pairs = zip(terms[:half], terms[half:], strict=True)
            terms = [builder.fadd(a, b) for a, b in pairs]
        mains.append(terms[0])
    clear()
    with loop(aligned, size, _I64(_LANES)) as (index, _):
        _accumulate(builder, weight, x, index, sums)
    tails = all_rows([builder.load(tail) for tail in sums])
    biases = zeros
    for lane in range(_LANES):
        biases = builder.insert_element(biases, bias, _I32(lane))
    totals = builder.fadd(builder.fadd(all_rows(mains), tails), biases)
    builder.store(_round(builder, totals), out, align=2)


@intrinsic
def _dot(typingctx, weight, x, size, rows, bias, out):
    """out[row] = weight @ x[:, row] + bias for up to 8 rows.

    Addresses of weight [size] bf16, x [size / 8, rows, 8] float32 and out [8] bf16.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, x, size, rows, bias, out = args
        pointers = [
            builder.inttoptr(weight, _I16.as_pointer()),
            builder.inttoptr(x, _FLOATS.as_pointer()),
            size,
            bias,
            builder.inttoptr(out, _SHORTS.as_pointer()),
        ]
        for count in range(1, _MAX_ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", rows, _I64(count))):
                _dot_rows(builder, count, pointers)
        return context.get_dummy_value()

    addresses = [types.int64] * 4
    return types.void(*addresses, types.float32, types.int64), codegen


@intrinsic
def _pointer(typingctx, address):
    """An address as a pointer to bf16 bits."""
    result = types.CPointer(types.uint16)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _I16.as_pointer())

    return result(types.int64), codegen


@kernel
def _linear_kernel(
    x_address,  # [num_rows, size] bf16
    weight_address,  # [num_outputs, size] bf16
    bias_address,  # [num_outputs] bf16, or 0
    out_address,  # [num_rows, num_outputs] bf16, out
    num_rows,
    num_outputs,
    size,
):
    x = carray(_pointer(x_address), (num_rows, size // _LANES, _LANES))
    out = carray(_pointer(out_address), (num_rows, num_outputs))
    bias_bits = carray(_pointer(bias_address), (num_outputs,))
    packed = np.empty(size * min(num_rows, _MAX_ROWS), np.uint32)
    bias = np.full(1, -0.0, np.float32)  # which leaves every sum as it is
    columns = np.empty((num_outputs, _MAX_ROWS), np.uint16)
    for first in range(0, num_rows, _MAX_ROWS):
        rows = min(_MAX_ROWS, num_rows - first)
        for row in range(rows):
            for i in range(size // _LANES):
                for lane in range(_LANES):
                    value = np.uint32(x[first + row, i, lane]) << np.uint32(16)
                    packed[(i * rows + row) * _LANES + lane] = value
        for n in range(num_outputs):
            if bias_address:
                bias.view(np.uint32)[0] = np.uint32(bias_bits[n]) << np.uint32(16)
            weight = weight_address + 2 * size * n
            column = columns.ctypes.data + 2 * _MAX_ROWS * n
            _dot(weight, packed.ctypes.data, size, rows, bias[0], column)
        for row in range(rows):
            for n in range(num_outputs):
                out[first + row, n] = columns[n, row]


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` of bf16 rows, bit for bit.

    Args:
        x: [..., size] bf16.
        weight: [num_outputs, size] bf16, contiguous; size a multiple of 16.
        bias: [num_outputs] bf16, contiguous.

    Returns:
        [..., num_outputs] bf16.
    """
    x = x.contiguous()
    size = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], len(weight))
    num_rows = x.numel() // size
    _linear_kernel(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        num_rows,
        len(weight),
        size,
    )
    return out
