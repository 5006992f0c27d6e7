# SPDX-License-Identifier: Apache-2.0
"""Draft the pool's best chains, completed by the model's bigrams, and the window.

What the paper calls lookahead decoding: G candidates and a window of W columns, all of
it every step.
"""

import torch

from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.draft.bigrams import complete
from vllm_lookahead.core.draft.pool import lookup
from vllm_lookahead.core.draft.window import add_window, read_window
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node
from vllm_lookahead.params import LookaheadParams


def propose(
    pages: BlockPages,
    batch: RequestBatch,
    max_candidates: int,
    bigrams: torch.Tensor | None = None,
) -> DraftTree:
    """Root, merged candidates, then the window (Fu et al. 2024, figure 2).

    Args:
        pages: the pool and the window.
        batch: B requests.
        max_candidates: G of the server.
        bigrams: [V, R] int32, see `core.draft.bigrams`; None for none.

    Returns:
        Trees padded to T = 1 + G(N-1) + max(0, W(N-1) - 1) nodes.
    """
    trees = []
    for request in batch.requests():
        chains = lookup(pages, request, max_candidates)
        if bigrams is not None:
            chains = complete(chains, request, bigrams, max_candidates)
        nodes = merge(chains, request)
        window = read_window(pages, request)
        trees.append(add_window(nodes, window, request.max_nodes))
    k, w = pages.window.shape[1:]
    return DraftTree.of(trees, LookaheadParams(w, k + 1, max_candidates).max_tree_size)


def merge(chains: list[list[int]], request: Request) -> list[Node]:
    """The root and the chains below it, sharing nodes where their prefixes agree."""
    nodes = [Node(request.root, EMPTY, 0, ROOT)]
    index: dict[tuple[int, ...], int] = {(): 0}
    for chain in chains:
        for depth in range(1, len(chain) + 1):
            path = tuple(chain[:depth])
            if path not in index and len(nodes) < request.max_nodes:
                index[path] = len(nodes)
                nodes.append(Node(path[-1], index[path[:-1]], depth, CANDIDATE))
    return nodes
