# SPDX-License-Identifier: Apache-2.0
"""Linear layers that cost less than one plain row per draft token.

Only where PyTorch has no bf16 product of its own for several rows, only on one
thread, and only if the results are the same to the last bit.
"""

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_lookahead.numba_kernels.linear import linear

# As `torch.backends.cpu.get_cpu_capability` calls an x86 CPU without AVX-512.
_CAPABILITY = "AVX2"


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def is_useful() -> bool:
    """Whether this process may compute bf16 layers row by row."""
    return (
        torch.backends.cpu.get_cpu_capability() == _CAPABILITY
        and torch.get_num_threads() == 1
    )


def replace_linear_layers(model: nn.Module) -> int:
    """Serve every bf16 layer for which `linear` equals what vLLM chose.

    Args:
        model: loaded; its layers have the `cpu_linear` that vLLM's
            `dispatch_cpu_unquantized_gemm` gave them.

    Returns:
        the number of layers replaced.
    """
    if not hasattr(torch.ops.vllm, "lookahead_linear"):
        direct_register_custom_op("lookahead_linear", linear, fake_impl=_linear_fake)
    layers = [m for m in model.modules() if hasattr(m, "cpu_linear") and _equals(m)]
    for layer in layers:
        layer.cpu_linear = torch.ops.vllm.lookahead_linear
    return len(layers)


@torch.inference_mode()
def _equals(layer: nn.Module) -> bool:
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if (
        weight.dtype != torch.bfloat16
        or weight.ndim != 2
        or not weight.is_contiguous()
        or weight.shape[1] % 16
    ):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator).to(weight.dtype)
    return torch.equal(linear(x, weight, bias), layer.cpu_linear(x, weight, bias))
