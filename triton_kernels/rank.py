# SPDX-License-Identifier: Apache-2.0
"""Which nodes of a batch's trees a step feeds: the likeliest of them all.

A node's rank is how many nodes of all trees go before it: likelier ones, and of equals
those nearer the front of their tree, then those of earlier requests. In no tree does
the chance rise from node to node, so the nodes of the lowest ranks are a tree of each.
Each program counts, by bisection of every other tree, and nothing is sorted.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect
from vllm_lookahead.triton_kernels.jit import jit

_checked = Checked()


@jit
def _rank_kernel(
    fed_ptr,  # [B] int32, out
    scheduled_ptr,  # [B] int32
    chances_ptr,  # [S, T] float32
    idx_mapping_ptr,  # [B] index of each request
    num_trees,
    budget,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,  # a power of two, as the next
    HALVINGS: tl.constexpr,  # of BLOCK_T to 1
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0)
    node = tl.arange(0, BLOCK_T)[:, None]
    index = tl.load(idx_mapping_ptr + b).to(tl.int64)
    inside = (node > 0) & (node < tl.load(scheduled_ptr + b))
    chance = tl.load(chances_ptr + index * T + node, mask=inside, other=-1.0)
    rank = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, num_trees, CHUNK):
        other = start + tl.arange(0, CHUNK)[None, :]
        live = other < num_trees
        most = tl.load(scheduled_ptr + other, mask=live, other=1)
        theirs = tl.load(idx_mapping_ptr + other, mask=live, other=0).to(tl.int64)
        row_ptr = chances_ptr + theirs * T
        before = tl.zeros([BLOCK_T, CHUNK], tl.int32)  # last node that does
        step = BLOCK_T
        for _ in tl.static_range(HALVINGS):
            step = step // 2
            probe = before + step
            exists = probe < most
            rival = tl.load(row_ptr + probe, mask=exists, other=-1.0)
            in_front = (probe < node) | ((probe == node) & (other < b))
            better = (rival > chance) | ((rival == chance) & in_front)
            before = tl.where(exists & better, probe, before)
        rank += tl.sum(before, 1)
    fed = inside & (rank[:, None] < budget)
    tl.store(fed_ptr + b, 1 + tl.sum(tl.sum(fed.to(tl.int32), 1), 0))


@jit
def _place_kernel(
    query_start_loc_ptr,  # [S+1] int32, out but for the first
    verified_ptr,  # [B] int32, out
    cu_verified_ptr,  # [B+1] int32, out but for the first, as the next
    cu_fed_ptr,
    fed_ptr,  # [B] int32
    scheduled_ptr,  # [B] int32
    num_requests,
    num_trees,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.arange(0, BLOCK)
    live = b < num_requests
    fed = tl.load(fed_ptr + b, mask=live, other=0)
    tl.store(verified_ptr + b, fed, mask=live)
    rows = tl.cumsum(fed, 0)
    tl.store(cu_verified_ptr + 1 + b, rows, mask=live)
    tl.store(cu_fed_ptr + 1 + b, rows, mask=live)
    others = live & (b >= num_trees)
    tokens = tl.where(others, tl.load(scheduled_ptr + b, mask=others, other=0), fed)
    # Behind the last request, where a graph has padding, all tokens.
    tl.store(query_start_loc_ptr + 1 + b, tl.cumsum(tokens, 0), mask=b < S)


def rank_nodes(
    chances: torch.Tensor,
    idx_mapping: torch.Tensor,
    scheduled: torch.Tensor,
    num_trees: int,
    budget: int,
    query_start_loc: torch.Tensor,
    counts: torch.Tensor,
    cu_verified: torch.Tensor,
    cu_fed: torch.Tensor,
) -> None:
    """Feed the likeliest nodes of a batch, which has no window.

    Args:
        chances: [S, T] float32 by request index, of each node; from the second one on
            none rises.
        idx_mapping: [B] int32 or int64, the index of each request.
        scheduled: [B] int32, most nodes of a tree, the root among them; tokens of a
            request without one.
        num_trees: of the first requests.
        budget: nodes to feed beside the roots, at most as many as there may be.
        query_start_loc: [S+1] int32, out: first token of each request; its first is 0.
        counts: [3, B] int32, the first two out: nodes fed and verified, all of them.
            1 is there, fed, for a request without a tree.
        cu_verified, cu_fed: [B+1] int32, out: their sums; the first of each is 0.
    """
    s, t = chances.shape
    (b,) = scheduled.shape
    tensors = (
        chances,
        idx_mapping,
        scheduled,
        query_start_loc,
        counts,
        cu_verified,
        cu_fed,
    )
    if tensors not in _checked:
        expect("chances", chances, (s, t), torch.float32)
        expect("idx_mapping", idx_mapping, (b,), *INTEGERS)
        expect("scheduled", scheduled, (b,))
        expect("query_start_loc", query_start_loc, (s + 1,))
        expect("counts", counts, (3, b))
        expect("cu_verified", cu_verified, (b + 1,))
        expect("cu_fed", cu_fed, (b + 1,))
        _checked.add(tensors)
    if not num_trees <= b <= s:
        raise ValueError(f"{num_trees} trees of {b} requests, but room for {s}")
    fed, verified, _ = counts.unbind(0)
    block = triton.next_power_of_2(t)
    if num_trees:
        _rank_kernel[(num_trees,)](
            fed,
            scheduled,
            chances,
            idx_mapping,
            num_trees,
            budget,
            T=t,
            BLOCK_T=block,
            HALVINGS=block.bit_length() - 1,
            CHUNK=max(1, min(64, 2048 // block)),
        )
    _place_kernel[(1,)](
        query_start_loc,
        verified,
        cu_verified,
        cu_fed,
        fed,
        scheduled,
        b,
        num_trees,
        S=s,
        BLOCK=triton.next_power_of_2(s),
    )
