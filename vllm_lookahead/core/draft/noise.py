# SPDX-License-Identifier: Apache-2.0
"""The noise of vLLM's CPU sampler, which is known before it is added."""

import torch


def _splitmix64(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64 bits (Steele et al. 2014)."""

    def fold(z: torch.Tensor, shift: int) -> torch.Tensor:
        return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))

    z = fold(z, 30) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = fold(z, 27) * (0x94D049BB133111EB - (1 << 64))
    return fold(z, 31)


def gumbel_noise(seeds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What vLLM's CPU sampler adds to logits (`fused_gumbel_argmax`).

    Args:
        seeds, tokens: integers that broadcast against each other.

    Returns:
        float64.
    """
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    bits = _splitmix64(_splitmix64(seeds.long()) + (tokens.long() + 1) * gamma)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))
