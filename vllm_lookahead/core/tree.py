# SPDX-License-Identifier: Apache-2.0
"""The draft tree: every token that one step feeds for a request.

Root first, then candidates, then the window, so that every prefix of a tree is
a tree. Node i's K/V goes to slot position p+i, its RoPE position is p+depth, and
it sees the context, its ancestors and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from vllm_lookahead.core.pages import EMPTY

ROOT, CANDIDATE, WINDOW = 0, 1, 2


class Node(NamedTuple):
    """One token of a tree; fields as the columns of `DraftTree`."""

    token: int
    parent: int
    depth: int
    kind: int


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

    @classmethod
    def of(cls, trees: Sequence[Sequence[Node]], size: int) -> Self:
        """Lists of nodes, padded to T = `size`."""
        padding = Node(EMPTY, EMPTY, 0, ROOT)
        padded = [[*nodes, *[padding] * (size - len(nodes))] for nodes in trees]
        cells = torch.tensor(padded, dtype=torch.int32).view(len(trees), size, 4)
        counts = torch.tensor([len(nodes) for nodes in trees], dtype=torch.int32)
        tokens, parents, depths, kinds = cells.permute(2, 0, 1).contiguous()
        return cls(tokens, parents, depths, kinds, counts)

    def first_nodes(self, size: int) -> Self:
        """The same trees in `size` columns: none has more nodes."""
        columns = self.tokens, self.parents, self.depths, self.kinds
        tokens, parents, depths, kinds = (column[:, :size] for column in columns)
        return type(self)(tokens, parents, depths, kinds, self.num_nodes)

    def chains(self) -> list[list[int]]:
        """The tokens behind each root, of trees that are chains."""
        rows = zip(self.tokens.tolist(), self.num_nodes.tolist(), strict=True)
        return [tokens[1:count] for tokens, count in rows]

    def nodes(self) -> list[list[Node]]:
        """The nodes of each tree, without the padding."""
        columns = self.tokens, self.parents, self.depths, self.kinds
        cells = torch.stack(columns, -1).tolist()
        counts = self.num_nodes.tolist()
        return [
            [Node(*node) for node in nodes[:count]]
            for nodes, count in zip(cells, counts, strict=True)
        ]
