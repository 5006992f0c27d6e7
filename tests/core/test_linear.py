# SPDX-License-Identifier: Apache-2.0
"""The bf16 linear kernel sums in ATen's order, on any CPU."""

import numpy as np
import pytest
import torch

from vllm_lookahead.numba_kernels.linear import linear

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
SHAPES = [(1, 1, 16), (2, 3, 48), (3, 5, 64), (7, 2, 80), (8, 33, 176), (19, 4, 256)]


def dot(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`dot_with_fp32_arith`: a product of two bf16 is exact in float32."""
    products = x * weight
    main, tail = np.zeros((8, 8), np.float32), np.zeros(8, np.float32)
    aligned = len(x) // 64 * 64
    for part in products[:aligned].reshape(-1, 8, 8):
        main += part
    for part in products[aligned:].reshape(-1, 8):
        tail += part
    for half in (4, 2, 1):
        main = main[:half] + main[half:]

    def lanes(vector: np.ndarray) -> np.ndarray:
        for step in (4, 2, 1):
            vector = vector + vector[np.arange(8) ^ step]
        return vector[0]

    return lanes(main[0]) + lanes(tail)


def tensors(rows: int, outputs: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, size), (outputs, size), (outputs,)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, int, int], with_bias: bool) -> None:
    x, weight, bias = tensors(*shape)
    expected = np.array(
        [[dot(a, b) for b in weight.float().numpy()] for a in x.float().numpy()]
    )
    if with_bias:
        expected += bias.float().numpy()
    result = linear(x, weight, bias if with_bias else None)
    assert torch.equal(result, torch.from_numpy(expected).bfloat16())


@pytest.mark.skipif(not AVX2, reason="PyTorch sums in another order on this CPU")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch(shape: tuple[int, int, int]) -> None:
    x, weight, bias = tensors(*shape)
    for arguments in ((x, weight), (x, weight, bias)):
        plain = torch.nn.functional.linear(*arguments)
        assert torch.equal(linear(*arguments), plain)


def test_special_values_and_strides() -> None:
    x, weight, _ = tensors(3, 2, 64)
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    result = linear(x, weight)
    assert result[0].isnan().all() and not result[1].isfinite().any()
    assert torch.equal(linear(x.t().contiguous().t(), weight)[2], result[2])
    assert linear(x[None, 2:], weight).shape == (1, 1, 2)
    assert linear(x[:0], weight).shape == (0, 2)
