# SPDX-License-Identifier: Apache-2.0
"""The noise of vLLM's V2 sampler, as it draws it.

Reference: `core.draft.noise.gpu_noise`. Hash, uniform and logarithm are copied from
vLLM 0.32, `vllm/v1/worker/gpu/sample/gumbel.py` (Apache-2.0, copyright contributors to
the vLLM project): `murmur3_hash32`, `murmur3_uniform32`, `_log1p_neg_stable` and
`gumbel_noised_argmax` without `USE_FP64`.
"""

import triton
import triton.language as tl


@triton.jit
def _rotate_left(value, shift: tl.constexpr):
    return (value << shift) | (value >> (32 - shift))


@triton.jit
def _mix(h, key):
    key *= 0xCC9E2D51
    key = _rotate_left(key, 15)
    key *= 0x1B873593
    h ^= key
    h = _rotate_left(h, 13)
    return h * 5 + 0xE6546B64


@triton.jit
def _hash(seed, position, token):
    seed = seed.to(tl.int64)
    position = position.to(tl.int64)
    h = (seed ^ seed).to(tl.uint32)
    h = _mix(h, (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, (position & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, token.to(tl.uint32))
    h ^= 16
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _log_of_one_minus(value):
    polynomial = 1.0 / 8.0
    polynomial = 1.0 / 7.0 + value * polynomial
    polynomial = 1.0 / 6.0 + value * polynomial
    polynomial = 1.0 / 5.0 + value * polynomial
    polynomial = 1.0 / 4.0 + value * polynomial
    polynomial = 1.0 / 3.0 + value * polynomial
    polynomial = 1.0 / 2.0 + value * polynomial
    polynomial = 1.0 + value * polynomial
    direct = tl.log(tl.maximum(1.0 - value, 5.960464477539063e-08))
    return tl.where(value < 0.25, -value * polynomial, direct)


@triton.jit
def gumbel_noise(seed, position, token):
    """What the sampler adds to the logit of each token, float32.

    Args:
        seed: int64, of the request.
        position: of the token before.
        token: any shape.
    """
    random = _hash(seed, position, token)
    high = (random >> 16).to(tl.int32).to(tl.float32)
    low = (random & 0xFFFF).to(tl.int32).to(tl.float32)
    uniform = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    return -tl.log(-_log_of_one_minus(uniform))
