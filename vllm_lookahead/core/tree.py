# SPDX-License-Identifier: Apache-2.0
"""The draft tree: every token that one step feeds for a request.

Root first, then candidates, then the window, so that every prefix of a tree is
a tree. Node i's K/V goes to slot position p+i, its RoPE position is p+depth, and
it sees the context, its ancestors and itself.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY

ROOT, CANDIDATE, WINDOW = 0, 1, 2


@dataclass
class DraftTree:
    """Draft trees of B requests, padded to T nodes each.

    Attributes:
        tokens: [B, T] int32, EMPTY beyond `num_nodes`.
        parents: [B, T] int32, index of the parent; parents[b, i] < i, and -1 at
            the root and beyond `num_nodes`.
        depths: [B, T] int32, distance from the root.
        kinds: [B, T] int32, ROOT, CANDIDATE or WINDOW. Only candidates are
            verified; any source of drafts may add them.
        num_nodes: [B] int32.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    kinds: torch.Tensor
    num_nodes: torch.Tensor

    def ancestors(self) -> torch.Tensor:
        """The tree part of the attention mask: [B, T, T] bool.

        [b, i, j] says that node i sees node j: its ancestors and itself.
        """
        batch, size = self.tokens.shape
        node = torch.arange(size, device=self.tokens.device)
        row = torch.arange(batch, device=self.tokens.device)[:, None]
        sees = (node == node[:, None]).repeat(batch, 1, 1)
        # Up the tree by 1, 2, 4, ... edges; what has no parent stays.
        up = torch.where(self.parents == EMPTY, node, self.parents)
        for _ in range((size - 1).bit_length()):
            sees |= sees[row, up]
            up = up.gather(1, up)
        return sees


def merge_candidates(candidates: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Merge chains under one root where their prefixes agree.

    Args:
        candidates: [B, G, K] int32 chains, EMPTY beyond a chain's end.

    Returns:
        node: [B, G, K] int64, tree index of each chain token (root is 0), shared
            by the chains that agree up to it.
        parent: [B, G, K] int64, tree index of its parent.
        is_first: [B, G, K] bool, the first chain that holds this node, and not
            EMPTY: True once per node.
    """
    batch, g, k = candidates.shape
    agree = (candidates[:, :, None] == candidates[:, None]).cumprod(-1)
    # [B, G, K] first chain with the same prefix
    owner = agree.argmax(2) if g else agree.sum(2)
    chain = torch.arange(g, device=candidates.device)[:, None]
    is_first = (owner == chain) & (candidates != EMPTY)
    index = is_first.view(batch, -1).cumsum(1).view(batch, g, k)
    node = index.gather(1, owner)
    parent = torch.cat([torch.zeros_like(node[..., :1]), node[..., :-1]], -1)
    return node, parent, is_first


def build_tree(
    batch: RequestBatch,
    candidates: torch.Tensor,
    window: torch.Tensor,
) -> DraftTree:
    """Root, merged candidates, then the Jacobi window (paper, figure 2).

    Args:
        batch: B requests.
        candidates: [B, G, N-1] int32 chains from the pool, best first.
        window: [B, N-1, W] int32, rows R0..R_{N-2}; (0, 0) is the root's place.

    Returns:
        Trees padded to T = 1 + G(N-1) + max(0, W(N-1) - 1) nodes.
    """
    b, g, k = candidates.shape
    w = window.shape[2]
    num_window = max(0, k * w - 1)
    size = 1 + g * k + num_window
    device = candidates.device

    # One spare column takes what does not exist.
    def column(fill: int) -> torch.Tensor:
        return torch.full((b, size + 1), fill, dtype=torch.int32, device=device)

    tokens, parents, depths = column(EMPTY), column(EMPTY), column(0)
    kinds = column(ROOT)
    tokens[:, 0] = batch.root

    node, parent, is_first = merge_candidates(candidates)
    exists = is_first & (node < batch.max_nodes[:, None, None])
    at = node.where(exists, size).view(b, -1)
    depth = torch.arange(1, k + 1, dtype=torch.int32, device=device)
    tokens.scatter_(1, at, candidates.view(b, -1))
    parents.scatter_(1, at, parent.int().view(b, -1))
    depths.scatter_(1, at, depth.expand(b, g, k).reshape(b, -1))
    kinds.scatter_(1, at, CANDIDATE)
    num_nodes = 1 + exists.view(b, -1).sum(1)
    columns = [c[:, :size] for c in (tokens, parents, depths, kinds)]
    return add_window(batch, DraftTree(*[*columns, num_nodes.int()]), window)


def add_window(batch: RequestBatch, tree: DraftTree, window: torch.Tensor) -> DraftTree:
    """The tree with the window behind its candidates, where it fits whole.

    Args:
        batch: B requests.
        tree: with room for the window in its padding.
        window: [B, N-1, W] int32, as in `build_tree`.
    """
    b, k, w = window.shape
    if w * k < 2:
        return tree
    size = tree.tokens.shape[1]
    named = tree.tokens, tree.parents, tree.depths, tree.kinds
    # One spare column takes what does not exist.
    columns = [F.pad(column, (0, 1)) for column in named]
    cell, row, col, valid = window_cells(batch, k, w)
    valid &= (tree.num_nodes + valid.sum(1) <= batch.max_nodes)[:, None]
    offset = tree.num_nodes[:, None] - 1  # cell c >= 1 is node offset + c
    at = (offset + cell).where(valid, size)
    # Row 0 runs along the columns, the other rows down from the row above.
    above = torch.where(row == 0, cell - 1, cell - batch.window_size[:, None])
    parent = torch.where(above == 0, 0, offset + above)
    value = window.view(b, -1).gather(1, (row * w + col).clamp(max=k * w - 1))
    columns[0].scatter_(1, at, value)
    columns[1].scatter_(1, at, parent.int())
    columns[2].scatter_(1, at, (row + col).int())
    columns[3].scatter_(1, at, WINDOW)
    num_nodes = (tree.num_nodes + valid.sum(1)).int()
    return DraftTree(*[*(column[:, :size] for column in columns), num_nodes])


def window_cells(
    batch: RequestBatch, num_rows: int, num_columns: int
) -> tuple[torch.Tensor, ...]:
    """Cells of each request's window other than the root's, in tree order.

    Args:
        batch: B requests; a request uses N_r-1 rows and W_r columns.
        num_rows: N-1 of the pages.
        num_columns: W of the pages.

    Returns:
        cell, row, col: [B, n] int64 for n = num_rows * num_columns - 1; cell
            counts row by row from 1 (0 is the root).
        valid: [B, n] bool, the cell belongs to the request's window.
    """
    width = batch.window_size[:, None].long()
    rows = batch.ngram_size[:, None].long() - 1
    cell = torch.arange(1, num_rows * num_columns, device=width.device)
    cell = cell.expand(width.shape[0], -1)
    row = cell // width.clamp(min=1)
    return cell, row, cell - row * width, (width > 0) & (row < rows)
