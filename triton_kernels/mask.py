# SPDX-License-Identifier: Apache-2.0
"""Who sees whom in a draft tree, and where each node stands.

Reference: `core.mask`, packed; position p + depth.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect, expect_tree
from vllm_lookahead.triton_kernels.jit import jit

_checked = Checked()


@jit
def _mask_kernel(
    bits_ptr,  # [B, T, WORDS] int32, out
    positions_ptr,  # [num_tokens], out
    input_ids_ptr,  # [num_tokens], out
    tokens_ptr,  # [B, T] int32
    parents_ptr,  # [B, T] int32
    depths_ptr,  # [B, T] int32
    num_nodes_ptr,  # [B] int32
    root_position_ptr,  # [B] int32
    query_start_loc_ptr,  # [B+1] int32
    stride_tree,
    T: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    node = tl.program_id(1) * BLOCK_NODES + tl.arange(0, BLOCK_NODES)
    live = node < tl.minimum(tl.load(num_nodes_ptr + b), T)
    row = b * stride_tree
    depth = tl.load(depths_ptr + row + node, mask=live, other=0)

    word = tl.arange(0, BLOCK_WORDS)
    bits = tl.zeros([BLOCK_NODES, BLOCK_WORDS], tl.int32)
    seen = tl.where(live, node, -1)  # and up to the root, then -1
    for _ in range(tl.max(depth, 0) + 1):
        here = word[None, :] == (seen >> 5)[:, None]
        bits |= tl.where(here, (1 << (seen & 31))[:, None], 0)
        seen = tl.load(parents_ptr + row + seen, mask=seen > 0, other=-1)
    tl.store(
        bits_ptr + (b * T + node)[:, None] * WORDS + word[None, :],
        bits,
        mask=(node < T)[:, None] & (word < WORDS)[None, :],
    )

    start = tl.load(query_start_loc_ptr + b)
    live = live & (node < tl.load(query_start_loc_ptr + b + 1) - start)
    at = start.to(tl.int64) + node
    position = tl.load(root_position_ptr + b) + depth
    tl.store(positions_ptr + at, position, mask=live)
    token = tl.load(tokens_ptr + row + node, mask=live, other=0)
    tl.store(input_ids_ptr + at, token, mask=live)


def build_mask(
    tree: DraftTree,
    root_position: torch.Tensor,
    query_start_loc: torch.Tensor,
    bits: torch.Tensor,
    positions: torch.Tensor,
    input_ids: torch.Tensor,
) -> None:
    """Write what the model's forward pass needs to know of the trees.

    Args:
        tree: B trees of at most T nodes. A tree of 0 nodes is padding.
        root_position: [B] int32, p.
        query_start_loc: [B+1] int32, where each request's tokens start in the
            flat batch; of a tree cut short there, the first nodes are written.
        bits: [B, T, ceil(T / 32)] int32, out. Bit j % 32 of word j // 32 of node i
            says that i sees j: its ancestors and itself. Zero past `num_nodes`.
        positions: [num_tokens] int32 or int64, out: p + depth, flat.
        input_ids: [num_tokens] int32 or int64, out: the nodes' tokens, flat.
    """
    b, t = tree.tokens.shape
    words = triton.cdiv(t, 32)
    flat = positions, input_ids
    tensors = *vars(tree).values(), *flat, root_position, query_start_loc, bits
    if tensors not in _checked:
        expect_tree(tree, b, t)
        expect("root_position", root_position, (b,))
        expect("query_start_loc", query_start_loc, (b + 1,))
        expect("bits", bits, (b, t, words))
        expect("positions", positions, (-1,), *INTEGERS)
        expect("input_ids", input_ids, (-1,), *INTEGERS)
        _checked.add(tensors)
    if not b:
        return
    # A warp per 32 nodes: the walk to the root is a chain of loads, not of work.
    block_nodes = 32
    _mask_kernel[(b, triton.cdiv(t, block_nodes))](
        bits,
        positions,
        input_ids,
        tree.tokens,
        tree.parents,
        tree.depths,
        tree.num_nodes,
        root_position,
        query_start_loc,
        tree.tokens.stride(0),
        T=t,
        WORDS=words,
        BLOCK_NODES=block_nodes,
        BLOCK_WORDS=triton.next_power_of_2(words),
        num_warps=1,
    )
