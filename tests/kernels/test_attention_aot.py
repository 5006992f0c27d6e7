# SPDX-License-Identifier: Apache-2.0
"""What tree attention takes of the GPUs it will run on, compiled for them here."""

import pytest

from tests.kernels import aot

MODULE = "tests.kernels.attention_cases"
# Most shared memory of a block, in bytes (CUDA programming guide, table "technical
# specifications per compute capability").
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def compile_and_check(archs: list[int], only: str, spill_bytes: int = 0) -> None:
    kernels = aot.compile_cases(MODULE, archs, only)
    assert kernels
    spills = [k for k in kernels if k.spill_bytes > spill_bytes]
    assert not spills
    too_big = [k for k in kernels if k.shared_bytes > SHARED[k.arch]]
    assert not too_big


def test_main_configurations_do_not_spill():
    """A tree of 120 nodes, split: the one that the speed of a step depends on."""
    compile_and_check([80, 90, 100], "120-split")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("only", ["main", "other", "gemma"])
def test_every_configuration_fits(arch, only):
    compile_and_check([arch], only)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [89, 90, 100, 120])  # fp8 came with sm_89
def test_fp8_fits(arch):
    compile_and_check([arch], "fp8")
