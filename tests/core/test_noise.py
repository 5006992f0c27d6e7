# SPDX-License-Identifier: Apache-2.0
"""The noise of vLLM's sampler; that it is the sampler's is in tests/v1."""

import torch

from vllm_lookahead.core.draft.noise import gumbel_noise


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.arange(500)[:, None], torch.arange(400))
    uniform = torch.exp(-torch.exp(-noise)).flatten().sort().values
    expected = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    assert (uniform - expected).abs().max() < 0.005
