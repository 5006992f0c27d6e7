# SPDX-License-Identifier: Apache-2.0
"""Draft trees on the device: by request slot between steps, by row within one.

A step's trees are made at the end of the step before, when nobody knows yet which
requests will share the next batch. So they wait in `TreeSlots`, and `TreeStep`
gathers those of its batch.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree

KIND_ROOT = tl.constexpr(ROOT)
KIND_CANDIDATE = tl.constexpr(CANDIDATE)
KIND_WINDOW = tl.constexpr(WINDOW)


@triton.jit
def _store_kernel(
    drafts_ptr,  # [B, N-1] int64, out
    slots_ptr,  # [5, S, T] int32, out
    slots_num_nodes_ptr,  # [S] int32, out
    tokens_ptr,  # [B, T] int32, as the four below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    origins_ptr,
    num_nodes_ptr,  # [B] int32
    idx_mapping_ptr,  # [B] slot of each request
    stride_tree,
    stride_column: tl.int64,  # S * T
    T: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,  # N-1
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping_ptr + b).to(tl.int64)
    node = tl.arange(0, BLOCK_T)
    mask = node < T
    row = b * stride_tree + node
    at = slots_ptr + slot * T + node
    token = tl.load(tokens_ptr + row, mask=mask)
    depth = tl.load(depths_ptr + row, mask=mask)
    kind = tl.load(kinds_ptr + row, mask=mask)
    tl.store(at, token, mask=mask)
    tl.store(at + stride_column, tl.load(parents_ptr + row, mask=mask), mask=mask)
    tl.store(at + 2 * stride_column, depth, mask=mask)
    tl.store(at + 3 * stride_column, kind, mask=mask)
    tl.store(at + 4 * stride_column, tl.load(origins_ptr + row, mask=mask), mask=mask)
    tl.store(slots_num_nodes_ptr + slot, tl.load(num_nodes_ptr + b))

    # The first chain's nodes follow the root: node i at depth i can be no other's.
    in_chain = (kind == KIND_CANDIDATE) & (depth == node)
    tl.store(
        drafts_ptr + b * NUM_DRAFTS + node - 1,
        tl.where(in_chain, token, 0).to(tl.int64),
        mask=(node >= 1) & (node <= NUM_DRAFTS),
    )


class TreeSlots:
    """The tree that each running request is fed in its next step.

    Attributes:
        columns: [5, max_num_reqs, T] int32, the five columns of `DraftTree`.
        num_nodes: [max_num_reqs] int32.
    """

    def __init__(
        self, max_num_reqs: int, max_tree_size: int, device: torch.device | str
    ) -> None:
        shape = (5, max_num_reqs, max_tree_size)
        self.columns = torch.zeros(shape, dtype=torch.int32, device=device)
        self.num_nodes = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)

    def store(
        self, tree: DraftTree, idx_mapping: torch.Tensor, drafts: torch.Tensor
    ) -> None:
        """Put a batch's trees away.

        Args:
            tree: B trees.
            idx_mapping: [B] integers, the slot of each.
            drafts: [B, N-1] int64, out: each tree's first candidate, padded with
                token 0; what the scheduler is told.
        """
        b, t = tree.tokens.shape
        num_drafts = drafts.shape[1]
        _store_kernel[(b,)](
            drafts,
            self.columns,
            self.num_nodes,
            tree.tokens,
            tree.parents,
            tree.depths,
            tree.kinds,
            tree.origins,
            tree.num_nodes,
            idx_mapping,
            tree.tokens.stride(0),
            self.columns.stride(0),
            T=t,
            NUM_DRAFTS=num_drafts,
            BLOCK_T=triton.next_power_of_2(max(t, num_drafts + 1)),
        )


@triton.jit(do_not_specialize=["num_trees", "dump"])
def _feed_kernel(
    trees_ptr,  # [5, S, T] int32, out, by row
    num_nodes_ptr,  # [S] int32, out
    position_ptr,  # [S] int32, out
    root_ptr,  # [S] int32, out
    longest_ptr,  # [S] int32, out: of each tree's candidates
    final_slot_ptr,  # [num_tokens] int64, in and out
    row_token_ptr,  # [rows] int64, out: where a logits row's token lies in the batch
    row_node_ptr,  # [rows] int64, out: b * T + node, or `dump`
    row_slot_ptr,  # [rows] int64, out
    row_local_ptr,  # [rows] int32, out
    slots_ptr,  # [5, S, T] int32
    slots_num_nodes_ptr,  # [S] int32
    idx_mapping_ptr,  # [B] slot of each request
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
    slot = tl.load(idx_mapping_ptr + b).to(tl.int64)
    fed = tl.load(fed_ptr + b)
    start = tl.load(query_start_loc_ptr + b + 1) - fed
    tl.store(position_ptr + b, tl.load(seq_lens_ptr + b) - fed)

    # A request that drafted nothing is a tree of one node, its last token.
    is_tree = b < num_trees
    drafted = tl.load(slots_num_nodes_ptr + slot, mask=is_tree, other=1)
    num_nodes = tl.maximum(tl.minimum(drafted, fed), 1)
    tl.store(num_nodes_ptr + b, num_nodes)
    node = tl.arange(0, BLOCK_T)
    live = node < tl.where(is_tree, num_nodes, 0)
    at = slots_ptr + slot * T + node
    last = tl.load(last_sampled_ptr + slot, mask=is_tree, other=0).to(tl.int32)
    root = tl.where(is_tree, last, tl.load(input_ids_ptr + start))
    tl.store(root_ptr + b, root)
    token = tl.load(at, mask=live, other=-1)
    token = tl.where(node == 0, root, token)
    kind = tl.load(at + 3 * stride_column, mask=live, other=KIND_ROOT)
    # A window that was cut is not harvested.
    cut = tl.where(drafted > fed, KIND_WINDOW, -1)
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
    origin = tl.load(at + 4 * stride_column, mask=live, other=-1)
    tl.store(out + 4 * stride_column, origin, mask=mask)

    draft = (node > 0) & (node < fed)
    tl.store(final_slot_ptr + start + node, -1, mask=draft)

    verified = node < tl.load(verified_ptr + b)
    row = tl.load(cu_verified_ptr + b) + node
    tl.store(row_token_ptr + row, (start + node).to(tl.int64), mask=verified)
    tl.store(row_node_ptr + row, b * T + node, mask=verified)
    tl.store(row_slot_ptr + row, slot, mask=verified)
    tl.store(row_local_ptr + row, node, mask=verified)

    width = tl.load(window_ptr + b)
    harvested = node < width
    row = tl.load(cu_window_ptr + b) + node
    cell = tl.maximum(num_nodes - width + node, 0)
    # With N = 2 the window's last row is its first, which starts at the root; the
    # root's token is sampled.
    is_root = node == tl.where(tl.load(ngram_ptr + b) == 2, 0, -1)
    tl.store(row_token_ptr + row, (start + cell).to(tl.int64), mask=harvested)
    tl.store(row_node_ptr + row, tl.where(is_root, dump, b * T + cell), mask=harvested)
