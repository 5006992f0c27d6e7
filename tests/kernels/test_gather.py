# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from vllm_lookahead.triton_kernels.gather import Starts, gather_starts


def states(size: int) -> list[torch.Tensor]:
    at = torch.arange(size)
    return [
        at.int() + 100,
        at[:, None] + 2**20,
        at.float() / 8,
        at - 2**62,
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 5, 130])
def test_in_the_order_of_the_batch(count, dtype):
    index = torch.randperm(200)[:count].to(dtype)
    kept = states(200)
    starts = Starts.allocate(140, "cpu")
    for column in starts:
        column.fill_(7)
    found = gather_starts(starts, index, *kept)
    for column, own, values in zip(starts, found, kept, strict=True):
        expected = values.flatten()[index.long()].to(column.dtype)
        assert torch.equal(own, expected)
        assert (column[count:] == 7).all()


def test_other_tensors_are_refused():
    starts, kept = Starts.allocate(3, "cpu"), states(9)
    with pytest.raises(ValueError, match="4 requests, but room for 3"):
        gather_starts(starts, torch.arange(4), *kept)
    kept[2] = kept[2].double()
    with pytest.raises(ValueError, match="^temperature is torch.float64"):
        gather_starts(starts, torch.arange(2), *kept)
