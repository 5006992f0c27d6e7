# SPDX-License-Identifier: Apache-2.0
"""The garbage that kernel tests find where a GPU's memory would be undefined."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")


@triton.jit
def _sum_kernel(x_ptr, out_ptr, n, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if HAS_OTHER:
        x = tl.load(x_ptr + i, mask=i < n, other=0)
    else:
        x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr, tl.sum(x, 0))


def total(x: torch.Tensor, n: int, has_other: bool) -> torch.Tensor:
    out = x.new_zeros(1)
    _sum_kernel[(1,)](x, out, n, has_other, 4)
    return out


FLOATS = (torch.float32, torch.float16)
INTEGERS = (torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_a_masked_load_without_other_is_seen(dtype: torch.dtype) -> None:
    x = torch.ones(4, dtype=dtype)
    assert total(x, 4, has_other=False) == 4
    assert total(x, 3, has_other=True) == 3
    found = [total(x, 3, has_other=False) for _ in range(50)]
    if dtype in FLOATS:
        assert all(value.isnan() for value in found)
    else:
        lanes = {int(value) - 3 for value in found}
        large = int.from_bytes(b"\x5a" * x.element_size())
        assert lanes == {large, 3, -1, 0, 1, 2, 4}  # 3 is the lane's own number, too


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_new_memory_is_garbage(dtype: torch.dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    for new in (torch.empty(2, dtype=dtype), torch.empty_like(x), x.new_empty(2)):
        garbage = new.isnan() if dtype in FLOATS else new == torch.iinfo(dtype).max
        assert garbage.all()
