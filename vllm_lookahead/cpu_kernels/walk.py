# SPDX-License-Identifier: Apache-2.0
"""The walk of `core.verify.verify`, a level at a time: tokens are drawn on the way."""

from dataclasses import dataclass

import numpy as np

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.cpu_kernels.jit import kernel
from vllm_lookahead.cpu_kernels.layout import FlatTrees


@kernel
def _advance_kernel(
    tokens,  # [b, T] int32
    parents,  # [b, T] int32
    kinds,  # [b, T] int32
    rows,  # [b] int64
    logits_node,  # [b, T] int64
    drawn,  # [i, N] int32
    level,
    path,  # [b, N] int32 in and out
    logits_row,  # [i] int64 in and out
    alive,  # [b] int64 out
):
    """Returns how many requests walk on."""
    count = 0
    for b in range(rows.shape[0]):
        at = path[b, level]
        if at == EMPTY or level + 1 == path.shape[1]:
            continue
        for node in range(at + 1, tokens.shape[1]):
            if (
                parents[b, node] == at
                and kinds[b, node] == CANDIDATE
                and tokens[b, node] == drawn[rows[b], level]
            ):
                path[b, level + 1] = node
                logits_row[rows[b]] = logits_node[b, node]
                alive[count] = rows[b]
                count += 1
                break
    return count


@dataclass
class Walk:
    """Index b runs over the trees, index i over all requests of the step.

    Attributes:
        path: [b, N] int32, node each token of a tree is sampled at, EMPTY beyond.
        logits_row: [i] int64, where the next token of each is sampled.
    """

    path: np.ndarray
    logits_row: np.ndarray
    _tree: tuple[np.ndarray, ...]

    @classmethod
    def start(
        cls, tree: DraftTree, rows: np.ndarray, flat: FlatTrees, max_emitted: int
    ) -> "Walk":
        """At the roots, and at the last token of every other request."""
        path = np.full((len(rows), max_emitted), EMPTY, np.int32)
        path[:, 0] = 0
        logits_row = flat.logits_start[1:] - 1
        logits_row[rows] = flat.logits_start[rows]
        columns = tree.tokens.numpy(), tree.parents.numpy(), tree.kinds.numpy()
        return cls(path, logits_row, (*columns, rows, flat.logits_node))

    def advance(self, drawn: np.ndarray, level: int) -> np.ndarray:
        """Step into the candidates that carry the tokens drawn at this level.

        Args:
            drawn: [i, N] int32, filled up to this level.
            level: 0 at the roots.

        Returns:
            [n] int64, ascending i of the requests that walk on.
        """
        alive = np.empty(len(self.path), np.int64)
        count = _advance_kernel(
            *self._tree, drawn, level, self.path, self.logits_row, alive
        )
        return alive[:count]
