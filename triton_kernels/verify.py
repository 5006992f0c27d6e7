# SPDX-License-Identifier: Apache-2.0
"""Sample and match: walk each tree while a candidate carries the token sampled.

Reference: `core.verify`.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect, expect_tree
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN

KIND_CANDIDATE = tl.constexpr(CANDIDATE)

_checked = Checked()


@jit
def _verify_kernel(
    emitted_ptr,  # [B, N] int32, out
    path_ptr,  # [B, N] int32, out
    num_emitted_ptr,  # [B] int32, out
    tokens_ptr,  # [B, T] int32
    parents_ptr,  # [B, T] int32
    kinds_ptr,  # [B, T] int32
    num_nodes_ptr,  # [B] int32
    sampled_ptr,  # [B, T]
    stride_tree,
    stride_sampled,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    node = tl.arange(0, BLOCK_T)
    num_nodes = tl.load(num_nodes_ptr + b)
    live = node < tl.minimum(num_nodes, T)
    row = b * stride_tree + node
    kind = tl.load(kinds_ptr + row, mask=live, other=0)
    is_candidate = live & (kind == KIND_CANDIDATE)
    token = tl.load(tokens_ptr + row, mask=is_candidate, other=NO_TOKEN)
    parent = tl.load(parents_ptr + row, mask=is_candidate, other=NO_TOKEN)

    at = tl.where(num_nodes > 0, 0, T)  # T: the walk is over
    num_emitted = 0
    for i in tl.static_range(N):
        alive = at < T
        y = tl.load(sampled_ptr + b * stride_sampled + at, mask=alive, other=NO_TOKEN)
        y = y.to(tl.int32)
        tl.store(emitted_ptr + b * N + i, y)
        tl.store(path_ptr + b * N + i, tl.where(alive, at, NO_TOKEN))
        num_emitted += alive.to(tl.int32)
        child = is_candidate & (parent == at) & (token == y)
        at = tl.min(tl.where(child, node, T), 0)
    tl.store(num_emitted_ptr + b, num_emitted)


def verify(tree: DraftTree, sampled: torch.Tensor, verdict: Verdict) -> None:
    """Walk every tree.

    Args:
        tree: siblings carry distinct tokens. A tree of 0 nodes emits nothing.
        sampled: [B, T] int32 or int64, the token sampled at each node; only the
            root's and the candidates' are read.
        verdict: out, of at most N tokens.
    """
    b, t = tree.tokens.shape
    n = verdict.tokens.shape[1]
    tensors = *vars(tree).values(), sampled, *vars(verdict).values()
    if tensors not in _checked:
        expect_tree(tree, b, t)
        expect("sampled", sampled, (b, t), *INTEGERS, rows_apart=True)
        expect("verdict.tokens", verdict.tokens, (b, n))
        expect("verdict.path", verdict.path, (b, n))
        expect("verdict.num_emitted", verdict.num_emitted, (b,))
        _checked.add(tensors)
    if not b:
        return
    _verify_kernel[(b,)](
        verdict.tokens,
        verdict.path,
        verdict.num_emitted,
        tree.tokens,
        tree.parents,
        tree.kinds,
        tree.num_nodes,
        sampled,
        tree.tokens.stride(0),
        sampled.stride(0),
        T=t,
        N=n,
        BLOCK_T=triton.next_power_of_2(t),
        num_warps=1,  # no barrier per token of the walk
    )
