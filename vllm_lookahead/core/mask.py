# SPDX-License-Identifier: Apache-2.0
"""The tree part of the attention mask: a node sees its ancestors and itself."""

import torch

from vllm_lookahead.core.tree import DraftTree


def ancestors(tree: DraftTree) -> torch.Tensor:
    """[B, T, T] bool: [b, i, j] says that node i sees node j; padding sees itself."""
    batch, size = tree.tokens.shape
    sees = torch.eye(size, dtype=torch.bool).repeat(batch, 1, 1)
    for b, nodes in enumerate(tree.nodes()):
        for i, node in enumerate(nodes[1:], 1):
            sees[b, i] |= sees[b, node.parent]
    return sees
