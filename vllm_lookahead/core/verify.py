# SPDX-License-Identifier: Apache-2.0
"""Sample and match: which drafted tokens the model says itself.

Walk from the root; while some candidate child carries the token sampled at the
current node, step into it. Every token on the way was sampled from the model's
true conditional, so the output is the model's for any sampler; the last one has
no node of its own and is the bonus token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, DraftTree, Node


@dataclass
class Verdict:
    """Outcome of a step for B requests.

    Attributes:
        tokens: [B, N] int32, the tokens emitted, EMPTY beyond `num_emitted`.
        path: [B, N] int32, node each of them was sampled at, the root first;
            EMPTY beyond `num_emitted`.
        num_emitted: [B] int32, the acceptance length, 1..N.
    """

    tokens: torch.Tensor
    path: torch.Tensor
    num_emitted: torch.Tensor


def walk(nodes: Sequence[Node], sampled: Sequence[int], max_emitted: int) -> list[int]:
    """The nodes that tokens are emitted at: the root, and the candidates that match.

    Args:
        nodes: of one tree.
        sampled: the token sampled at each node.
        max_emitted: N.
    """
    path = [0] if nodes else []
    for i, node in enumerate(nodes):  # a child comes after its parent
        matches = node.kind == CANDIDATE and node.token == sampled[node.parent]
        if matches and node.parent == path[-1] and len(path) < max_emitted:
            path.append(i)
    return path


def verify(tree: DraftTree, sampled: torch.Tensor, max_emitted: int) -> Verdict:
    """Walk every tree.

    Args:
        tree: siblings carry distinct tokens. A tree of 0 nodes emits nothing.
        sampled: [B, T] integers, the token sampled at each node; only the root's
            and the candidates' are read.
        max_emitted: N, columns of the result.
    """
    shape = len(tree.num_nodes), max_emitted
    tokens = torch.full(shape, EMPTY, dtype=torch.int32)
    path = tokens.clone()
    for b, (nodes, answers) in enumerate(
        zip(tree.nodes(), sampled.tolist(), strict=True)
    ):
        for i, node in enumerate(walk(nodes, answers, max_emitted)):
            tokens[b, i], path[b, i] = answers[node], node
    return Verdict(tokens, path, (path != EMPTY).sum(1, dtype=torch.int32))
