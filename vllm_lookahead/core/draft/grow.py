# SPDX-License-Identifier: Apache-2.0
"""Draft: grow a tree level by level from all that is known, and keep the best of it.

The likeliest nodes of a level get children, and of all nodes of all levels the tree
takes the likeliest (Li et al. 2024, "EAGLE-2", sections 4.1 and 4.2). A child is never
likelier than its parent, so the best nodes of a tree are a tree.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.draft.estimate import WEIGHTS, Estimator, Hints
from vllm_lookahead.core.draft.index import answer_index, text_index
from vllm_lookahead.core.draft.window import add_window, read_window
from vllm_lookahead.core.pages import CONTEXT, EMPTY, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node
from vllm_lookahead.params import LookaheadParams

# Nodes of a level that get children. In the simulator's forest, which has other sources
# besides, 2.20 and 2.52 tokens a step at 16 and 32 nodes, greedy, against 2.19 and 2.48
# where every node may have them (docs/drafting.md).
BEAM = 8


@dataclass
class Branch:
    """A path below the root: its tokens, and the log of its chance to be accepted."""

    path: tuple[int, ...]
    log_chance: float


def draft(
    pages: BlockPages,
    batch: RequestBatch,
    hints: Hints,
    max_candidates: int,
    weights: Mapping[str, float] = WEIGHTS,
) -> tuple[DraftTree, torch.Tensor]:
    """A tree for each request: the root, the likeliest candidates, the window.

    Args:
        pages: texts and answers of the requests, and their windows.
        batch: B requests. N-1 bounds the depth of candidates, G how many of them have
            the same depth, and `max_nodes` the tree.
        hints: what else is known.
        max_candidates: G of the server.
        weights: of the sources.

    Returns:
        tree: padded to T = 1 + G(N-1) + max(0, W(N-1) - 1) nodes, without regard to a
            budget; candidates in falling order of their chance.
        chances: [B, T] float32, of each candidate to be accepted; 0 elsewhere.
    """
    k, w = pages.window.shape[1:]
    size = LookaheadParams(w, k + 1, max_candidates).max_tree_size
    trees, chances = [], torch.zeros(len(batch.root), size)
    for b, request in enumerate(batch.requests()):
        estimator = estimator_of(pages, request, hints, b, weights)
        branches = grow(estimator, request, hints.least)[
            : max(0, request.max_nodes - 1)
        ]
        nodes = [Node(request.root, EMPTY, 0, ROOT)]
        node_of: dict[tuple[int, ...], int] = {(): 0}
        for branch in branches:
            path = branch.path
            node_of[path] = len(nodes)
            chances[b, len(nodes)] = math.exp(branch.log_chance)
            nodes.append(Node(path[-1], node_of[path[:-1]], len(path), CANDIDATE))
        window = read_window(pages, request)
        trees.append(add_window(nodes, window, request.max_nodes))
    return DraftTree.of(trees, size), chances


def estimator_of(
    pages: BlockPages,
    request: Request,
    hints: Hints,
    b: int,
    weights: Mapping[str, float],
) -> Estimator:
    """Of request b, from what its pages hold now."""
    tokens = [*pages.history(request), request.root][-CONTEXT:]
    text, answers = text_index(pages, request), answer_index(pages, request)
    before = 0 if hints.before is None else int(hints.before[b])
    position = request.position - before
    return Estimator(tokens, position, text, answers, hints, b, weights)


def grow(estimate: Estimator, request: Request, least: float) -> list[Branch]:
    """Branches in falling order of their chance; of equal ones the shorter first."""
    log_least = math.log(least) if least > 0 else -math.inf
    level, grown = [Branch((), 0.0)], []
    for _ in range(request.ngram_size - 1):
        children = [
            Branch((*parent.path, token), parent.log_chance + log_chance)
            for parent in level[:BEAM]
            for token, log_chance in estimate(parent.path).items()
        ]
        children = [child for child in children if child.log_chance >= log_least]
        children.sort(key=lambda child: -child.log_chance)  # stable
        level = children[: request.verification_set_size]
        grown += level
    return sorted(grown, key=lambda branch: -branch.log_chance)
