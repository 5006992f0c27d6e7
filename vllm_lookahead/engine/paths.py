# SPDX-License-Identifier: Apache-2.0
"""Chains that the scheduler asks for: drafts of requests with a grammar.

A path is a run of tokens, the first one at a given position, which the request is
likely to follow. A scheduler that is a step ahead names tokens, too, that the step in
flight may have emitted by now; they say whether the request is on the path.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree


class Paths(NamedTuple):
    """Of B requests.

    Attributes:
        start: [B] int32, position of the first token.
        tokens: [B, L] int32, EMPTY behind the last one.
    """

    start: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(
        cls, paths: Sequence[tuple[int, list[int]]], device: torch.device | str
    ) -> "Paths":
        """In one copy to the device."""
        longest = max(1, *(len(tokens) for _, tokens in paths))
        host = np.full((len(paths), 1 + longest), EMPTY, np.int32)
        for row, (start, tokens) in zip(host, paths, strict=True):
            row[0], row[1 : 1 + len(tokens)] = start, tokens
        packed = async_tensor_h2d(host, device=device)
        return cls(packed[:, 0], packed[:, 1:])


def follow(
    tree: DraftTree,
    position: torch.Tensor,
    root: torch.Tensor,
    most: torch.Tensor | int,
    paths: Paths,
) -> DraftTree:
    """Chains along the paths, as far as requests are on them.

    A chain that begins with the rest of its path stays: it is the longer one.

    Args:
        tree: B chains in T columns.
        position, root: [B] integers, p and x of each.
        most: nodes of a chain, [B, 1] or one number.
        paths: of the same requests.
    """
    length, columns = paths.tokens.shape[1], tree.tokens.shape[1]
    column = torch.arange(columns, dtype=torch.int32, device=position.device)
    root_at = (position - paths.start)[:, None]  # in the path; -1 just before it
    at = root_at + column
    there = (at >= 0) & (at < length) & (column < most)
    token = paths.tokens.gather(1, at.clamp(0, length - 1).long()).where(there, EMPTY)
    is_on_path = (root_at == -1) | (token[:, :1] == root[:, None])
    is_node = (token != EMPTY) & (column > 0)
    is_kept = ((token == tree.tokens) | ~is_node).all(1, keepdim=True)
    is_new = is_on_path & ~is_kept
    token[:, 0] = root
    parents = (column - 1).where(is_node, EMPTY)
    kinds = torch.where(is_node, CANDIDATE, ROOT).int()
    num_nodes = 1 + is_node.sum(1, dtype=torch.int32)
    return DraftTree(
        token.where(is_new, tree.tokens),
        parents.where(is_new, tree.parents),
        column.where(is_node, 0).where(is_new, tree.depths),
        kinds.where(is_new, tree.kinds),
        num_nodes.where(is_new[:, 0], tree.num_nodes),
    )
