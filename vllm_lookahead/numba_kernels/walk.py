# SPDX-License-Identifier: Apache-2.0
"""The walk of `core.verify.verify`, a level at a time: tokens are drawn on the way."""

import numpy as np
import torch

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.jit import kernel
from vllm_lookahead.numba_kernels.layout import FlatTrees


@kernel
def _advance_kernel(
    tree_tokens,  # [b, T] int32
    parents,  # [b, T] int32
    kinds,  # [b, T] int32
    requests,  # [b] int64, i of each tree
    logits_node,  # [b, T] int64
    drawn,  # [n] int64
    level,
    tokens,  # [i, N] int32 in and out, as the rest
    emitted,  # [b, N] int32
    path,  # [b, N] int32
    num_emitted,  # [b] int32
    logits_row,  # [i] int64
    alive,  # [i] int64, n of them
):
    """Returns how many requests walk on."""
    for k in range(drawn.shape[0]):
        tokens[alive[k], level] = drawn[k]
    count = 0
    for b in range(requests.shape[0]):
        at, i = path[b, level], requests[b]
        if at == EMPTY:
            continue
        emitted[b, level], num_emitted[b] = tokens[i, level], level + 1
        if level + 1 == path.shape[1]:
            continue
        for node in range(at + 1, tree_tokens.shape[1]):
            if (
                parents[b, node] == at
                and kinds[b, node] == CANDIDATE
                and tree_tokens[b, node] == tokens[i, level]
            ):
                path[b, level + 1] = node
                logits_row[i] = logits_node[b, node]
                alive[count] = i
                count += 1
                break
    return count


class Walk:
    """From the roots, and from the last token of every request without a tree.

    Index b runs over the trees, index i over all requests of the step.

    Attributes:
        tokens: [i, N] int32 drawn so far, EMPTY beyond.
        logits_row: [i] int64, where the next token of each is sampled.
        alive: [n] int64, ascending i of the requests that draw next.
        level: tokens that these have drawn.
    """

    def __init__(
        self, tree: DraftTree, requests: np.ndarray, flat: FlatTrees, max_emitted: int
    ) -> None:
        num_requests, num_trees = len(flat.start) - 1, len(requests)
        drawn = np.full((num_requests + 2 * num_trees, max_emitted), EMPTY, np.int32)
        self.tokens = drawn[:num_requests]
        self._emitted, self._path = drawn[num_requests:].reshape(2, num_trees, -1)
        self._path[:, 0] = 0
        self._num_emitted = np.empty(num_trees, np.int32)
        # A tree's first is its root's; a request without one has no other.
        self.logits_row = flat.logits_start[:-1].copy()
        self.alive = self._alive = np.arange(num_requests)
        self.level = 0
        columns = tree.tokens.numpy(), tree.parents.numpy(), tree.kinds.numpy()
        self._tree = *columns, requests, flat.logits_node

    def advance(self, drawn: np.ndarray) -> None:
        """Step into the candidates that carry the tokens drawn.

        Args:
            drawn: [n] int64, the next token of each request alive.
        """
        count = _advance_kernel(
            *self._tree,
            drawn,
            self.level,
            self.tokens,
            self._emitted,
            self._path,
            self._num_emitted,
            self.logits_row,
            self._alive,
        )
        self.alive = self._alive[:count]
        self.level += 1

    def verdict(self) -> Verdict:
        """Of the trees, once none is alive."""
        verdict = self._emitted, self._path, self._num_emitted
        return Verdict(*map(torch.from_numpy, verdict))
