# SPDX-License-Identifier: Apache-2.0
"""The noise that drafts count on is what vLLM's V2 sampler adds."""

import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.triton_kernels.noise import gumbel_noise

SEEDS = (0, 1, -1, 7, 2**31, 2**40 + 3, 2**63 - 1, -(2**50) - 9)
TOKENS = 1024
# Float32 knows little of a hash next to 2**32, but it is no such token that wins.
LEAST = -1.5


@triton.jit
def _our_kernel(out_ptr, seeds_ptr, position, first, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    seed = tl.load(seeds_ptr + tl.program_id(0))
    noise = gumbel_noise(seed, position, first + offset)
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offset, noise)


@triton.jit
def _their_kernel(
    out_ptr, seeds_ptr, position, first, ARGMAX: tl.constexpr, BLOCK: tl.constexpr
):
    """Logits of 0, in which each token is alone."""
    offset = tl.arange(0, BLOCK)
    token = (first + offset)[None, :]
    noise, _ = ARGMAX(
        token * 0.0,
        token,
        token >= 0,
        tl.load(seeds_ptr + tl.program_id(0)),
        position,
        1.0,
        IS_DRAFTING=False,
        USE_FP64=False,
    )
    tl.store(out_ptr + tl.program_id(0) * BLOCK + offset, noise)


def their_argmax() -> Any:
    """vLLM takes Triton for absent on a CPU, and has left its functions bare there."""
    pytest.importorskip("vllm")
    spec = importlib.util.find_spec("vllm.v1.worker.gpu.sample.gumbel")
    theirs, present = importlib.util.module_from_spec(spec), ModuleType("present")
    present.tl, present.triton = tl, triton
    with mock.patch.dict(sys.modules, {"vllm.triton_utils": present}):
        spec.loader.exec_module(theirs)
    return theirs.gumbel_noised_argmax


def drawn(kernel: Any, position: int, first: int, **given: Any) -> torch.Tensor:
    """[SEEDS, TOKENS] float32, from a token on."""
    noise, seeds = torch.empty(len(SEEDS), TOKENS), torch.tensor(SEEDS)
    kernel[(len(SEEDS),)](noise, seeds, position, first, **given, BLOCK=TOKENS)
    return noise


def as_the_core_says(position: int, first: int) -> torch.Tensor:
    rows = [
        [gpu_noise(seed, position, first + i) for i in range(TOKENS)] for seed in SEEDS
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("position", [0, 1, 4095, 2**31 - 1])
@pytest.mark.parametrize("first", [0, 200_000])
def test_ours_is_theirs_and_the_cores(position: int, first: int) -> None:
    ours = drawn(_our_kernel, position, first)
    theirs = drawn(_their_kernel, position, first, ARGMAX=their_argmax())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert ours.max() > 6 and ours.min() < -1.8
    expected = as_the_core_says(position, first)
    wins = expected > LEAST
    assert wins.float().mean() > 0.98
    torch.testing.assert_close(ours[wins], expected[wins], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, expected, rtol=0.1, atol=0.01)
