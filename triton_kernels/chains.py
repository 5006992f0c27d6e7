# SPDX-License-Identifier: Apache-2.0
"""Build the draft trees: root, merged candidates, window.

Reference: `core.draft.chains.merge` and `core.draft.window`.
"""

import itertools

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.window import SEED_STRIDE
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.triton_kernels.checks import (
    Checked,
    expect,
    expect_batch,
    expect_tree,
)
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN, expect_pages, load_slot

KIND_ROOT = tl.constexpr(ROOT)
KIND_CANDIDATE = tl.constexpr(CANDIDATE)
KIND_WINDOW = tl.constexpr(WINDOW)
STRIDE = tl.constexpr(SEED_STRIDE)

_checked = Checked()


@triton.jit
def _store_nodes(
    tokens_ptr,  # [T] int32 of this request, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    node,
    mask,
    token,
    parent,
    depth,
    kind,
):
    tl.store(tokens_ptr + node, token, mask=mask)
    tl.store(parents_ptr + node, parent, mask=mask)
    tl.store(depths_ptr + node, depth, mask=mask)
    tl.store(kinds_ptr + node, kind, mask=mask)


@triton.jit
def _first_chain(
    candidates_ptr,  # [G, K] int32 of this request
    same,  # [BLOCK_G, BLOCK_G], chains i and j agree before k
    k,
    G: tl.constexpr,
    K: tl.constexpr,
):
    """Token k of each chain, and the first chain that agrees up to it."""
    chain = tl.arange(0, same.shape[0])
    live = chain < G
    token = tl.load(candidates_ptr + chain * K + k, mask=live, other=NO_TOKEN)
    same = same & (token[:, None] == token[None, :]) & live[None, :]
    owner = tl.min(tl.where(same, chain[None, :], G), 1)
    return same, token, owner, (owner == chain) & live & (token != NO_TOKEN)


@jit
def _tree_kernel(
    tokens_ptr,  # [B, T] int32, out, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    num_nodes_ptr,  # [B] int32, out
    candidates_ptr,  # [B, G, K] int32
    page_tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    window_ptr,  # [num_blocks, K, COLUMNS] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    root_ptr,  # [B] int32
    window_size_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    max_nodes_ptr,  # [B] int32
    stride_tree,
    stride_table,
    T: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,  # N-1
    COLUMNS: tl.constexpr,  # W
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = b * stride_tree
    tokens_ptr += row
    parents_ptr += row
    depths_ptr += row
    kinds_ptr += row
    root = tl.load(root_ptr + b)
    max_nodes = tl.minimum(tl.load(max_nodes_ptr + b), T)
    num_nodes = tl.minimum(max_nodes, 1)

    if G > 0:
        # Chains that begin alike share nodes: those of the first of them.
        candidates_ptr += b * G * K
        chain = tl.arange(0, BLOCK_G)
        same = (chain[:, None] >= 0) & (chain[None, :] >= 0)
        own = tl.zeros([BLOCK_G], tl.int32)
        for k in tl.static_range(K):
            same, _, _, is_first = _first_chain(candidates_ptr, same, k, G, K)
            own += is_first.to(tl.int32)
        index = tl.cumsum(own, 0) - own  # nodes are numbered chain by chain
        parent = tl.zeros([BLOCK_G], tl.int32)
        same = (chain[:, None] >= 0) & (chain[None, :] >= 0)
        for k in tl.static_range(K):
            same, token, owner, is_first = _first_chain(candidates_ptr, same, k, G, K)
            index += is_first.to(tl.int32)
            exists = is_first & (index < max_nodes)
            _store_nodes(
                tokens_ptr,
                parents_ptr,
                depths_ptr,
                kinds_ptr,
                index,
                exists,
                token,
                parent,
                k + 1,
                KIND_CANDIDATE,
            )
            num_nodes += tl.sum(exists.to(tl.int32), 0)
            owns = owner[:, None] == chain[None, :]
            parent = tl.sum(tl.where(owns, index[None, :], 0), 1)

    node = tl.arange(0, BLOCK_T)
    num_drafted = num_nodes
    if COLUMNS > 0:
        width = tl.load(window_size_ptr + b)
        rows = tl.load(ngram_size_ptr + b) - 1
        num_cells = width * rows  # with the root's
        fits = (num_cells > 0) & (num_drafted + num_cells - 1 <= max_nodes)
        num_nodes += tl.where(fits, num_cells - 1, 0)
        cell = node - num_drafted + 1
        live = (cell >= 1) & (node < num_nodes)
        r = cell // tl.maximum(width, 1)
        column = cell - r * width

        position = tl.load(position_ptr + b)
        table_ptr = block_table_ptr + b * stride_table
        last = tl.maximum(position - 1, 0)
        tail = tl.load(table_ptr + last // BLOCK_SIZE, mask=fits, other=0)
        page_ptr = window_ptr + tail.to(tl.int64) * (K * COLUMNS)
        cell_ptr = page_ptr + r * COLUMNS + column
        token = tl.load(cell_ptr, mask=live, other=NO_TOKEN)
        # A cell that was never written is a run of the request's own history.
        seed_at = (column * STRIDE + r) % tl.maximum(position, 1)
        seeded = live & (token == NO_TOKEN)
        slot = load_slot(table_ptr, seed_at, seeded, BLOCK_SIZE)
        seed = tl.load(page_tokens_ptr + slot, mask=seeded, other=NO_TOKEN)
        token = tl.where(token == NO_TOKEN, seed, token)
        token = tl.where(token == NO_TOKEN, root, token)

        # Row 0 runs along the columns, the others down from the row above.
        above = cell - tl.where(r == 0, 1, width)
        _store_nodes(
            tokens_ptr,
            parents_ptr,
            depths_ptr,
            kinds_ptr,
            node,
            live,
            token,
            tl.where(above == 0, 0, num_drafted - 1 + above),
            r + column,
            KIND_WINDOW,
        )

    is_root = node < num_nodes
    _store_nodes(
        tokens_ptr,
        parents_ptr,
        depths_ptr,
        kinds_ptr,
        node,
        (node == 0) | ((node >= num_nodes) & (node < T)),
        tl.where(is_root, root, NO_TOKEN),
        NO_TOKEN,
        0,
        KIND_ROOT,
    )
    tl.store(num_nodes_ptr + b, num_nodes)


def build_tree(
    pages: BlockPages,
    batch: RequestBatch,
    candidates: torch.Tensor,
    tree: DraftTree,
) -> None:
    """Root, merged candidates, then the Jacobi window, read or seeded.

    Args:
        pages: for the window and the tokens that seed it.
        batch: B requests. One with max_nodes 0 is padding: a tree of no nodes.
        candidates: [B, G, N-1] int32 chains from the pool, best first.
        tree: out, T = 1 + G(N-1) + max(0, W(N-1) - 1) nodes per request.
    """
    b, g = batch.block_table.shape[0], candidates.shape[1]
    _, k, w = pages.window.shape
    t = 1 + g * k + max(0, w * k - 1)
    given = vars(pages).values(), vars(batch).values(), vars(tree).values()
    tensors = *itertools.chain(*given), candidates
    if tensors not in _checked:
        expect_batch(batch)
        expect_pages(pages)
        expect("candidates", candidates, (b, g, k))
        expect_tree(tree, b, t)
        _checked.add(tensors)
    if not b:
        return
    _tree_kernel[(b,)](
        tree.tokens,
        tree.parents,
        tree.depths,
        tree.kinds,
        tree.num_nodes,
        candidates,
        pages.tokens,
        pages.window,
        batch.block_table,
        batch.position,
        batch.root,
        batch.window_size,
        batch.ngram_size,
        batch.max_nodes,
        tree.tokens.stride(0),
        batch.block_table.stride(0),
        T=t,
        G=g,
        K=k,
        COLUMNS=w,
        BLOCK_SIZE=pages.block_size,
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK_G=triton.next_power_of_2(max(g, 1)),
        num_warps=4,
    )
