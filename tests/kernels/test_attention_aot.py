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


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_main_configurations_do_not_spill(arch):
    """Heads of 128: trees of 120 nodes and plain requests, in splits and whole, GQA
    and 32 heads on 32, an fp8 cache; and trees on heads of 64."""
    only = "^main-128-(1|120)(-split)?$|^main-64-120-split$|^one-head-128"
    compile_and_check([arch], only if arch < 89 else f"{only}|^fp8-120$")


def test_nothing_compiles_after_the_warm_up():
    warm = aot.compile_cases(MODULE, [90], "^warm-up$")
    names = sorted(k.kernel for k in warm)
    assert names == ["merge_splits_kernel"] * 5 + ["tree_attention_kernel"] * 8
    assert len(aot.compile_cases(MODULE, [90], "^server$")) == len(warm)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("only", ["main", "one-head", "other", "gemma"])
def test_every_configuration_fits(arch, only):
    compile_and_check([arch], only)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [89, 90, 100, 120])  # fp8 came with sm_89
def test_fp8_fits(arch):
    compile_and_check([arch], "fp8")
