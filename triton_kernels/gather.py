# SPDX-License-Identifier: Apache-2.0
"""Gather what the next draft starts from: one launch in place of an indexing each."""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect
from vllm_lookahead.triton_kernels.jit import jit

_checked = Checked()


class Starts(NamedTuple):
    """Of the requests of a batch; the first B are written.

    Attributes:
        position: [S] int32, p of the next root.
        root: [S] int32, x.
        temperature: [S] float32.
        seeds: [S] int64, of the sampler's noise.
    """

    position: torch.Tensor
    root: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor

    @classmethod
    def allocate(cls, max_num_reqs: int, device: torch.device | str) -> Self:
        types = torch.int32, torch.int32, torch.float32, torch.int64
        return cls(*(torch.zeros(max_num_reqs, dtype=t, device=device) for t in types))


@jit
def _gather_kernel(
    position_ptr,  # [S] int32, out, as the three below
    root_ptr,
    temperature_ptr,
    seeds_ptr,
    idx_mapping_ptr,  # [B] index of each request
    num_computed_ptr,  # [S] int32
    last_sampled_ptr,  # [S] int64
    temperatures_ptr,  # [S] float32
    all_seeds_ptr,  # [S] int64
    n,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = b < n
    index = tl.load(idx_mapping_ptr + b, mask=live, other=0).to(tl.int64)
    position = tl.load(num_computed_ptr + index, mask=live)
    tl.store(position_ptr + b, position, mask=live)
    root = tl.load(last_sampled_ptr + index, mask=live).to(tl.int32)
    tl.store(root_ptr + b, root, mask=live)
    temperature = tl.load(temperatures_ptr + index, mask=live)
    tl.store(temperature_ptr + b, temperature, mask=live)
    tl.store(seeds_ptr + b, tl.load(all_seeds_ptr + index, mask=live), mask=live)


def gather_starts(
    starts: Starts,
    idx_mapping: torch.Tensor,
    num_computed: torch.Tensor,
    last_sampled: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
) -> Starts:
    """What is kept by request index, in the order of a batch.

    Args:
        starts: out.
        idx_mapping: [B] int32 or int64, the request index of each.
        num_computed: [S] int32, tokens whose K/V is final.
        last_sampled: [S, 1] int64.
        temperature: [S] float32.
        seeds: [S] int64.

    Returns:
        The first B of `starts`.
    """
    b = idx_mapping.shape[0]
    tensors = *starts, num_computed, last_sampled, temperature, seeds, idx_mapping
    if tensors not in _checked:
        s = starts.position.shape[0]
        expect("idx_mapping", idx_mapping, (b,), *INTEGERS)
        expect("num_computed", num_computed, (-1,))
        expect("last_sampled", last_sampled, (-1, 1), torch.int64)
        expect("temperature", temperature, (-1,), torch.float32)
        expect("seeds", seeds, (-1,), torch.int64)
        expect("starts.position", starts.position, (s,))
        expect("starts.root", starts.root, (s,))
        expect("starts.temperature", starts.temperature, (s,), torch.float32)
        expect("starts.seeds", starts.seeds, (s,), torch.int64)
        if b > s:
            raise ValueError(f"{b} requests, but room for {s}")
        _checked.add(tensors)
    if b:
        block = 128
        _gather_kernel[(triton.cdiv(b, block),)](
            *starts,
            idx_mapping,
            num_computed,
            last_sampled,
            temperature,
            seeds,
            b,
            BLOCK=block,
            num_warps=4,
        )
    return Starts(*(column[:b] for column in starts))
