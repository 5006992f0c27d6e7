# SPDX-License-Identifier: Apache-2.0
"""The noise of vLLM's samplers; that it is theirs is in tests/v1 and tests/kernels."""

import itertools
import random

import pytest
import torch

from vllm_lookahead.core.draft.noise import cpu_noise, gpu_noise
from vllm_lookahead.numba_kernels import draft


def draws(noise, *keys: range) -> torch.Tensor:
    cells = [noise(*key) for key in itertools.product(*keys)]
    return torch.tensor(cells, dtype=torch.float64)


@pytest.mark.parametrize(
    ("noise", "keys"),
    [
        (cpu_noise, (range(200), range(1), range(300))),
        (gpu_noise, (range(20), range(20), range(300))),
        (gpu_noise, (range(0, 2**40, 2**32), range(2), range(240))),
    ],
    ids=["cpu", "gpu", "gpu, high words of seeds"],
)
def test_noise_is_standard_gumbel(noise, keys):
    found = draws(noise, *keys)
    uniform = torch.exp(-torch.exp(-found)).sort().values
    expected = (torch.arange(len(uniform)) + 0.5) / len(uniform)
    # 1.63 of these is a 1% Kolmogorov-Smirnov test.
    assert (uniform - expected).abs().max() < 1.63 * len(uniform) ** -0.5
    assert len(found.unique()) > 0.999 * len(found), "every key has noise of its own"


def test_a_cpus_seed_is_of_one_position():
    assert cpu_noise(3, 4, 5) == cpu_noise(3, 9, 5)
    assert gpu_noise(3, 4, 5) != gpu_noise(3, 9, 5)


def test_numba_has_the_same_noise():
    rng = random.Random(0)
    for seed in [0, 1, 2**63 - 1, *(rng.randrange(2**63) for _ in range(200))]:
        token = rng.randrange(200_000)
        expected = cpu_noise(seed, 0, token)
        assert draft._noise(seed, token) == pytest.approx(expected, rel=1e-12)
