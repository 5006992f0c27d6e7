# SPDX-License-Identifier: Apache-2.0
"""A layer is served by our kernel only if nothing of its results changes."""

import pytest
import torch
from torch import nn

from vllm_lookahead.engine.v1.linear import replace_linear_layers

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


class Model(nn.Module):
    """Layers with the `cpu_linear` that vLLM puts on them."""

    def __init__(self, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 24, dtype=dtype) for _ in range(2))
        for layer in self.layers:
            layer.requires_grad_(False)
            layer.cpu_linear = nn.functional.linear  # type: ignore[assignment]


@pytest.mark.skipif(not AVX2, reason="PyTorch sums in another order on this CPU")
def test_every_row_stays_as_it_was() -> None:
    model = Model()
    assert replace_linear_layers(model) == 2
    for layer in model.layers:
        assert layer.cpu_linear is not nn.functional.linear
        for shape in ((1, 64), (7, 64), (2, 9, 64)):
            x = torch.randn(shape).bfloat16()
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            result = layer.cpu_linear(x, layer.weight, layer.bias)  # type: ignore[operator]
            assert torch.equal(result, expected)


def test_a_compiled_graph_takes_the_layer_whole() -> None:
    model = Model()
    replace_linear_layers(model)
    layer = model.layers[0]

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def run(x: torch.Tensor) -> torch.Tensor:
        return layer.cpu_linear(x, layer.weight, layer.bias) + 1  # type: ignore[operator]

    for rows in (1, 3, 9):
        assert run(torch.randn(rows, 64).bfloat16()).shape == (rows, 24)


def test_other_layers_are_left_alone() -> None:
    assert replace_linear_layers(Model(dtype=torch.float32)) == 0
    assert replace_linear_layers(Model(size=72)) == 0
    different = Model()
    for layer in different.layers:
        layer.cpu_linear = lambda x, weight, bias: (  # type: ignore[assignment]
            nn.functional.linear(x, weight, bias) + 0.01
        )
    assert replace_linear_layers(different) == 0
