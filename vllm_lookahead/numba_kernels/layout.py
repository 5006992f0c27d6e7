# SPDX-License-Identifier: Apache-2.0
"""Trees of a step: how large each may be, and where it lies in the flat batch."""

from dataclasses import dataclass

import numpy as np

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import CANDIDATE, WINDOW, DraftTree
from vllm_lookahead.numba_kernels.jit import kernel

# Columns of what `size_trees` reads.
INDEX, POSITION, W, N, G, MOST = range(6)


@kernel
def size_trees(
    requests,  # [b, 6] int64: request index, p, W_r, N_r, G_r, most nodes
    max_model_len,
    plain,  # whether every tree is its root
):
    """W, N, G and the most nodes of each tree: [4, b] int32."""
    num_trees = requests.shape[0]
    sizes = np.empty((4, num_trees), np.int32)
    for b in range(num_trees):
        room = max_model_len - requests[b, POSITION]
        # A token may be emitted at every position up to max_model_len - 1.
        n = min(requests[b, N], room - 1)
        sizes[0, b], sizes[2, b] = requests[b, W], requests[b, G]
        sizes[1, b] = max(n, 2)
        sizes[3, b] = 1 if plain or n < 2 else min(requests[b, MOST], room)
    return sizes


@dataclass
class FlatTrees:
    """Index b runs over the trees, index i over all requests of the step.

    Attributes:
        start: [i + 1] int64, first token of each request in the flat batch.
        logits_start: [i + 1] int64, first logits row of each request.
        logits_indices: [rows] int64, flat token of each logits row: of a tree, the
            root, the candidates and the window's last row; else the last token.
        logits_node: [b, T] int64, logits row of each node, -1 without logits.
        is_final: [tokens] bool, the token's K/V is final once computed: all but
            the nodes after a root.
        fed: [3, nodes] int64: place in the flat batch, token, RoPE position.
        longest: [b] int64, length of the longest candidate.
        is_chain: [b] bool, whether causal order is tree order.
    """

    start: np.ndarray
    logits_start: np.ndarray
    logits_indices: np.ndarray
    logits_node: np.ndarray
    is_final: np.ndarray
    fed: np.ndarray
    longest: np.ndarray
    is_chain: np.ndarray


@kernel
def _lay_out_kernel(
    tokens,  # [b, T] int32, as the three below
    parents,
    depths,
    kinds,
    num_nodes,  # [b] int32
    window_size,  # [b] int32
    position,  # [b] int32
    requests,  # [b] int64, i of each tree, ascending
    max_position,
    start,  # [i + 1] in: tokens of each request at i + 1; out, as the rest
    logits_start,
    logits_indices,
    logits_node,
    is_final,
    fed,
    longest,
    is_chain,
):
    """Returns how many logits rows and nodes there are."""
    num_logits, num_fed, b = 0, 0, -1
    start[0] = logits_start[0] = 0
    is_final[:] = True
    for i in range(start.shape[0] - 1):
        has_tree = b + 1 < requests.shape[0] and requests[b + 1] == i
        b += has_tree
        start[i + 1] = start[i] + (num_nodes[b] if has_tree else start[i + 1])
        if not has_tree:
            logits_indices[num_logits] = start[i + 1] - 1
            num_logits += 1
            logits_start[i + 1] = num_logits
            continue
        longest[b], is_chain[b] = 0, True
        # Of the window its last row: N_r-2 deep and beyond.
        last_row = num_nodes[b] - window_size[b]
        logits_node[b] = -1
        for node in range(num_nodes[b]):
            at = start[i] + node
            is_candidate = kinds[b, node] == CANDIDATE
            if is_candidate:
                longest[b] = max(longest[b], depths[b, node])
            if node > 0 and parents[b, node] != node - 1:
                is_chain[b] = False
            in_last_row = kinds[b, node] == WINDOW and node >= last_row
            if node == 0 or is_candidate or in_last_row:
                logits_node[b, node] = num_logits
                logits_indices[num_logits] = at
                num_logits += 1
            is_final[at] = node == 0
            fed[0, num_fed], fed[1, num_fed] = at, tokens[b, node]
            # A window may reach past the model's length; its tokens are hints.
            fed[2, num_fed] = min(position[b] + depths[b, node], max_position)
            num_fed += 1
        logits_start[i + 1] = num_logits
    return num_logits, num_fed


def lay_out(
    tree: DraftTree,
    batch: RequestBatch,
    requests: np.ndarray,
    num_tokens: np.ndarray,
    max_model_len: int,
) -> FlatTrees:
    """Put the trees in place of their requests' tokens.

    Args:
        tree, batch: of the trees.
        requests: [b] int64, i of each, ascending.
        num_tokens: [i] int64 scheduled; those of a request with a tree are not read.
        max_model_len: bound of a position.
    """
    num_requests, (num_trees, size) = len(num_tokens), tree.tokens.shape
    num_nodes = tree.num_nodes.numpy()
    start = np.empty(num_requests + 1, np.int64)
    start[1:] = num_tokens
    total = int(num_tokens.sum() - num_tokens[requests].sum() + num_nodes.sum())
    flat = FlatTrees(
        start,
        np.empty(num_requests + 1, np.int64),
        np.empty(total + num_requests, np.int64),
        np.empty((num_trees, size), np.int64),
        np.empty(total, np.bool_),
        # A column more than is ever used, so that what is cut off never is contiguous:
        # kernels are compiled for one layout.
        np.empty((3, num_trees * size + 1), np.int64),
        np.empty(num_trees, np.int64),
        np.empty(num_trees, np.bool_),
    )
    num_logits, num_fed = _lay_out_kernel(
        tree.tokens.numpy(),
        tree.parents.numpy(),
        tree.depths.numpy(),
        tree.kinds.numpy(),
        num_nodes,
        batch.window_size.numpy(),
        batch.position.numpy(),
        requests,
        max_model_len - 1,
        *vars(flat).values(),
    )
    flat.logits_indices = flat.logits_indices[:num_logits]
    flat.fed = flat.fed[:, :num_fed]
    return flat


@kernel
def feed_trees(
    fed,  # [3, nodes] int64, as in FlatTrees
    start,  # [b + 1] int64
    position,  # [b] int32
    block_table,  # [b, max_blocks] int32
    block_size,
    tokens,  # [nodes or more] int32 out
    rope_positions,  # [nodes or more] int64 out
    slots,  # [nodes or more] int64 out
    query_start,  # [b + 1 or more] int32 out, all of it
    seq_lens,  # [b or more] int32 out, all of it
    upper_bounds,  # of seq_lens, the same
):
    """Inputs of a step that feeds these trees and nothing else.

    Returns the slots of the roots: [b] int64.
    """
    num_trees, num_nodes = position.shape[0], fed.shape[1]
    tokens[:num_nodes], rope_positions[:num_nodes] = fed[1], fed[2]
    query_start[:] = num_nodes
    query_start[:num_trees] = start[:num_trees]
    seq_lens[:] = 0
    for b in range(num_trees):
        nodes = start[b + 1] - start[b]
        seq_lens[b] = position[b] + nodes
        for node in range(nodes):
            at = position[b] + node
            block = np.int64(block_table[b, at // block_size])
            slots[start[b] + node] = block * block_size + at % block_size
    upper_bounds[:] = seq_lens
    return slots[start[:num_trees]]
