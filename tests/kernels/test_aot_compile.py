# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs that are not here."""

import pytest

from tests.kernels.aot import compile_cases

KERNELS = {
    "_write_tokens_kernel",
    "_file_kernel",
    "_draft_kernel",
    "_mask_kernel",
    "_verify_kernel",
    "_compact_kernel",
    "_update_kernel",
    "_likeliest_kernel",
    "_keep_answers_kernel",
    "_gather_kernel",
    "_store_kernel",
    "_feed_kernel",
    "_rank_kernel",
    "_place_kernel",
}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_server_of_default_size(arch):
    compiled = compile_cases("tests.kernels.aot_cases", [arch], "default")
    assert {kernel.kernel for kernel in compiled} == KERNELS
    spilled = {kernel.kernel: kernel.spill_bytes for kernel in compiled}
    assert not any(spilled.values()), spilled


def test_one_binary_serves_any_batch():
    """And warming up compiles it: nothing compiles while requests wait."""
    compiled = compile_cases("tests.kernels.aot_cases", [90], "server")
    assert sorted(kernel.kernel for kernel in compiled) == sorted(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_sizes(arch):
    compiled = compile_cases("tests.kernels.aot_cases", [arch])
    assert {kernel.kernel for kernel in compiled} == KERNELS
    spilled = {
        (kernel.case, kernel.kernel): kernel.spill_bytes
        for kernel in compiled
        if kernel.spill_bytes
    }
    assert not spilled, spilled
