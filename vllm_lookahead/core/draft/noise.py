# SPDX-License-Identifier: Apache-2.0
"""The noise of vLLM's samplers, which is known before it is added."""

import math
from typing import Any

import numpy as np

_MASK32 = 2**32 - 1


def cpu_noise(seed: int, position: int, token: Any) -> Any:
    """What vLLM's CPU sampler adds to a logit (`fused_gumbel_argmax`).

    Args:
        seed: of the draw.
        position: not read: a seed is of one position.
        token: whose logit it is, or an array of them.
    """
    tokens = np.atleast_1d(token).astype(np.uint64)
    state = _splitmix64(np.atleast_1d(np.int64(seed)).astype(np.uint64))
    bits = _splitmix64(state + (tokens + 1) * np.uint64(0x9E3779B97F4A7C15)) >> 11
    return -np.log(-np.log((bits + 0.5) * 2.0**-53)).reshape(np.shape(token))


def gpu_noise(seed: int, position: int, token: int) -> float:
    """What vLLM's V2 sampler adds to a logit (`gumbel_noised_argmax`).

    Args:
        seed: of the request.
        position: of the token before.
        token: whose logit it is.
    """
    uniform = _murmur3(seed, position, token) * 2.0**-32 + 2.0**-33
    return -math.log(-math.log1p(-uniform))


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014), of uint64."""
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)


def _murmur3(seed: int, position: int, token: int) -> int:
    """MurmurHash3 of four words (vLLM's `murmur3_hash32`)."""
    h = 0
    for word in (seed, seed >> 32, position, token):
        k = (word & _MASK32) * 0xCC9E2D51 & _MASK32
        k = (k << 15 | k >> 17) & _MASK32
        h ^= k * 0x1B873593 & _MASK32
        h = (h << 13 | h >> 19) & _MASK32
        h = (h * 5 + 0xE6546B64) & _MASK32
    h ^= 16
    h = (h ^ h >> 16) * 0x85EBCA6B & _MASK32
    h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK32
    return h ^ h >> 16
