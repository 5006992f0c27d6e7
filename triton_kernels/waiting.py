# SPDX-License-Identifier: Apache-2.0
"""Draft trees on the device: by request index between steps, by row within one.

`store_trees` puts a batch's trees away; `feed_trees` gathers those of the next batch
and says which of its rows need logits. Their definition in plain Python is
`tests/kernels/test_waiting.py`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.triton_kernels.checks import INTEGERS, Checked, expect, expect_tree
from vllm_lookahead.triton_kernels.jit import jit

KIND_ROOT = tl.constexpr(ROOT)
KIND_CANDIDATE = tl.constexpr(CANDIDATE)
KIND_WINDOW = tl.constexpr(WINDOW)

_stored, _fed = Checked(), Checked()


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b)


@jit
def _store_kernel(
    drafts_ptr,  # [B, N-1] int64, out
    waiting_ptr,  # [4, S, T] int32, out
    waiting_num_nodes_ptr,  # [S] int32, out
    waiting_chances_ptr,  # [S, T] float32, out
    tokens_ptr,  # [B, T] int32, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    num_nodes_ptr,  # [B] int32
    chances_ptr,  # [B, T] float32
    idx_mapping_ptr,  # [B] index of each request
    stride_tree,
    stride_chances,
    stride_column: tl.int64,  # S * T
    T: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,  # N-1
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    index = tl.load(idx_mapping_ptr + b).to(tl.int64)
    node = tl.arange(0, BLOCK_T)
    mask = node < T
    row = b * stride_tree + node
    at = waiting_ptr + index * T + node
    token = tl.load(tokens_ptr + row, mask=mask)
    depth = tl.load(depths_ptr + row, mask=mask)
    kind = tl.load(kinds_ptr + row, mask=mask)
    tl.store(at, token, mask=mask)
    tl.store(at + stride_column, tl.load(parents_ptr + row, mask=mask), mask=mask)
    tl.store(at + 2 * stride_column, depth, mask=mask)
    tl.store(at + 3 * stride_column, kind, mask=mask)
    tl.store(waiting_num_nodes_ptr + index, tl.load(num_nodes_ptr + b))
    # An exponential is rounded: nodes are ranked as if no child were likelier.
    behind = mask & (node > 0)
    chance = tl.load(chances_ptr + b * stride_chances + node, mask=behind, other=1.0)
    chance = tl.associative_scan(chance, 0, _lower)
    tl.store(waiting_chances_ptr + index * T + node, chance, mask=mask)

    # The first chain's nodes follow the root: node i at depth i can be no other's.
    # Beyond T, `kind` is undefined.
    in_chain = mask & (kind == KIND_CANDIDATE) & (depth == node)
    tl.store(
        drafts_ptr + b * NUM_DRAFTS + node - 1,
        tl.where(in_chain, token, 0).to(tl.int64),
        mask=(node >= 1) & (node <= NUM_DRAFTS),
    )


def store_trees(
    tree: DraftTree,
    chances: torch.Tensor,
    idx_mapping: torch.Tensor,
    columns: torch.Tensor,
    num_nodes: torch.Tensor,
    waiting_chances: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """Put a batch's trees away, where their requests find them.

    Args:
        tree: B trees of up to T nodes.
        chances: [B, T] float32 of each node to be accepted.
        idx_mapping: [B] int32 or int64, the request index of each.
        columns: [4, S, T] int32, out, the four columns of `DraftTree` by request index.
        num_nodes: [S] int32, out.
        waiting_chances: [S, T] float32, out: of each node, and nowhere more than of the
            node before it. 1 at the root.
        drafts: [B, N-1] int64, out: each tree's first candidate, padded with 0.
    """
    b, t = tree.tokens.shape
    tensors = *vars(tree).values(), chances, idx_mapping, columns, num_nodes
    tensors = *tensors, waiting_chances, drafts
    if tensors not in _stored:
        expect_tree(tree, b, t)
        expect("idx_mapping", idx_mapping, (b,), *INTEGERS)
        expect("chances", chances, (b, t), torch.float32, rows_apart=True)
        expect("columns", columns, (4, -1, t))
        expect("num_nodes", num_nodes, (columns.shape[1],))
        shape = columns.shape[1:]
        expect("waiting_chances", waiting_chances, shape, torch.float32)
        expect("drafts", drafts, (b, -1), torch.int64)
        _stored.add(tensors)
    num_drafts = drafts.shape[1]
    if not b:
        return
    _store_kernel[(b,)](
        drafts,
        columns,
        num_nodes,
        waiting_chances,
        tree.tokens,
        tree.parents,
        tree.depths,
        tree.kinds,
        tree.num_nodes,
        chances,
        idx_mapping,
        tree.tokens.stride(0),
        chances.stride(0),
        columns.stride(0),
        T=t,
        NUM_DRAFTS=num_drafts,
        BLOCK_T=triton.next_power_of_2(max(t, num_drafts + 1)),
    )


@jit
def _feed_kernel(
    trees_ptr,  # [4, S, T] int32, out, by row
    num_nodes_ptr,  # [S] int32, out
    position_ptr,  # [S] int32, out
    root_ptr,  # [S] int32, out
    longest_ptr,  # [S] int32, out
    final_slot_ptr,  # [num_tokens] int64, in and out
    row_token_ptr,  # [rows] int64, out
    row_node_ptr,  # [rows] int64, out
    row_index_ptr,  # [rows] int64, out
    row_local_ptr,  # [rows] int32, out
    waiting_ptr,  # [4, S, T] int32
    waiting_num_nodes_ptr,  # [S] int32
    idx_mapping_ptr,  # [B] index of each request
    query_start_loc_ptr,  # [B+1] int32
    seq_lens_ptr,  # [B] int32
    input_ids_ptr,  # [num_tokens] int32
    last_sampled_ptr,  # [S] int64
    fed_ptr,  # [B] int32, nodes fed
    verified_ptr,  # [B] int32, nodes with a logits row to sample from
    window_ptr,  # [B] int32, nodes of the window's last row with a logits row
    ngram_ptr,  # [B] int32, N
    cu_verified_ptr,  # [B+1] int32
    cu_window_ptr,  # [B+1] int32, counted on from the verified rows
    num_trees,
    dump,
    stride_column: tl.int64,  # S * T
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    index = tl.load(idx_mapping_ptr + b).to(tl.int64)
    fed = tl.load(fed_ptr + b)
    width = tl.load(window_ptr + b)
    start = tl.load(query_start_loc_ptr + b + 1) - fed
    tl.store(position_ptr + b, tl.load(seq_lens_ptr + b) - fed)

    # A request that drafted nothing is a tree of one node, its last token.
    is_tree = b < num_trees
    drafted = tl.load(waiting_num_nodes_ptr + index, mask=is_tree, other=1)
    num_nodes = tl.maximum(tl.minimum(drafted, fed), 1)
    tl.store(num_nodes_ptr + b, num_nodes)
    node = tl.arange(0, BLOCK_T)
    live = node < tl.where(is_tree, num_nodes, 0)
    at = waiting_ptr + index * T + node
    last = tl.load(last_sampled_ptr + index, mask=is_tree, other=0).to(tl.int32)
    root = tl.where(is_tree, last, tl.load(input_ids_ptr + start))
    tl.store(root_ptr + b, root)
    token = tl.load(at, mask=live, other=-1)
    token = tl.where(node == 0, root, token)
    kind = tl.load(at + 3 * stride_column, mask=live, other=KIND_ROOT)
    # A window that was cut is not harvested, and none whose last row has no logits:
    # what `sampled` holds there is another request's.
    cut = tl.where((width == 0) | (drafted > fed), KIND_WINDOW, -1)
    kind = tl.where(kind == cut, KIND_ROOT, kind)
    out = trees_ptr + b * T + node
    mask = node < T
    tl.store(out, token, mask=mask)
    parent = tl.load(at + stride_column, mask=live, other=-1)
    tl.store(out + stride_column, parent, mask=mask)
    depth = tl.load(at + 2 * stride_column, mask=live, other=0)
    tl.store(out + 2 * stride_column, depth, mask=mask)
    tl.store(longest_ptr + b, tl.max(tl.where(kind == KIND_CANDIDATE, depth, 0), 0))
    tl.store(out + 3 * stride_column, kind, mask=mask)

    draft = (node > 0) & (node < fed)
    tl.store(final_slot_ptr + start + node, -1, mask=draft)

    verified = node < tl.load(verified_ptr + b)
    row = tl.load(cu_verified_ptr + b) + node
    tl.store(row_token_ptr + row, (start + node).to(tl.int64), mask=verified)
    tl.store(row_node_ptr + row, b * T + node, mask=verified)
    tl.store(row_index_ptr + row, index, mask=verified)
    tl.store(row_local_ptr + row, node, mask=verified)

    harvested = node < width
    row = tl.load(cu_window_ptr + b) + node
    cell = tl.maximum(num_nodes - width + node, 0)
    # With N = 2 the window's last row is its first, which starts at the root; the
    # root's token is sampled.
    is_root = node == tl.where(tl.load(ngram_ptr + b) == 2, 0, -1)
    tl.store(row_token_ptr + row, (start + cell).to(tl.int64), mask=harvested)
    tl.store(row_node_ptr + row, tl.where(is_root, dump, b * T + cell), mask=harvested)


class FedTrees(NamedTuple):
    """What a step is fed, by row; the first B are written.

    Attributes:
        columns: [4, S, T] int32, the four columns of `DraftTree`.
        num_nodes: [S] int32.
        position, root: [S] int32, p and x of each.
        longest: [S] int32, length of each tree's longest candidate.
        final_slot: [num_tokens] int64, slots whose K/V the step computes for good;
            -1 is written for the nodes after a root.
    """

    columns: torch.Tensor
    num_nodes: torch.Tensor
    position: torch.Tensor
    root: torch.Tensor
    longest: torch.Tensor
    final_slot: torch.Tensor


class LogitsRows(NamedTuple):
    """Rows of logits, those to sample from before those to refill the window with.

    Attributes:
        token: [rows] int64, where the row's token lies in the batch.
        node: [rows] int64, b * T + node; S * T for what nobody reads.
        index: [rows] int64, the request's; of rows to sample from only, as the next.
        local: [rows] int32, the node.
    """

    token: torch.Tensor
    node: torch.Tensor
    index: torch.Tensor
    local: torch.Tensor


def feed_trees(
    fed: FedTrees,
    rows: LogitsRows,
    columns: torch.Tensor,
    num_nodes: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    input_ids: torch.Tensor,
    last_sampled: torch.Tensor,
    counts: torch.Tensor,
    ngram_size: torch.Tensor,
    cu_verified: torch.Tensor,
    cu_window: torch.Tensor,
    num_trees: int,
) -> None:
    """Gather the trees of a batch.

    Args:
        fed, rows: out.
        columns, num_nodes: [4, S, T] and [S] int32, trees by request index.
        idx_mapping: [B] int32 or int64, the index of each request.
        query_start_loc: [B+1] int32, first token of each request in the flat batch.
        seq_lens: [B] int32, tokens of each request, those of the step included.
        input_ids: [num_tokens] int32, where a request without a tree has its root.
        last_sampled: [S, 1] int64, the roots of the others, by request index.
        counts: [3, B] int32, nodes fed, verified, and of the window's last row with
            logits. A window without those is fed but not harvested.
        ngram_size: [B] int32.
        cu_verified, cu_window: [B+1] int32, first of the rows of each request; the
            latter counts on from the former's last.
        num_trees: of the first requests; the others are fed their last token.
    """
    _, s, t = columns.shape
    b = idx_mapping.shape[0]
    tensors = (
        *fed,
        *rows,
        columns,
        num_nodes,
        idx_mapping,
        query_start_loc,
        seq_lens,
        input_ids,
        last_sampled,
        counts,
        ngram_size,
        cu_verified,
        cu_window,
    )
    if tensors not in _fed:
        expect("columns", columns, (4, s, t))
        expect("num_nodes", num_nodes, (s,))
        expect("fed.columns", fed.columns, (4, s, t))
        for name in ("num_nodes", "position", "root", "longest"):
            expect(f"fed.{name}", getattr(fed, name), (s,))
        expect("fed.final_slot", fed.final_slot, (-1,), torch.int64)
        expect("rows.token", rows.token, (-1,), torch.int64)
        expect("rows.node", rows.node, rows.token.shape, torch.int64)
        expect("rows.index", rows.index, rows.token.shape, torch.int64)
        expect("rows.local", rows.local, rows.token.shape)
        expect("idx_mapping", idx_mapping, (b,), *INTEGERS)
        expect("query_start_loc", query_start_loc, (b + 1,))
        expect("seq_lens", seq_lens, (b,))
        expect("input_ids", input_ids, (-1,))
        expect("last_sampled", last_sampled, (s, 1), torch.int64)
        expect("counts", counts, (3, b))
        expect("ngram_size", ngram_size, (b,))
        expect("cu_verified", cu_verified, (b + 1,))
        expect("cu_window", cu_window, (b + 1,))
        _fed.add(tensors)
    if not num_trees <= b <= s:
        raise ValueError(f"{num_trees} trees of {b} requests, but room for {s}")
    if not b:
        return
    _feed_kernel[(b,)](
        *tensors[:-4],
        *counts.unbind(0),
        *tensors[-3:],
        num_trees,
        s * t,
        columns.stride(0),
        T=t,
        BLOCK_T=triton.next_power_of_2(t),
    )
