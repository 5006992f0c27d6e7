# SPDX-License-Identifier: Apache-2.0
"""Parts of the core once more, for one request: written from the docstrings alone."""

from collections.abc import Sequence

from tests.core.build import Row
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, Node


def draft_tree(
    row: Row, chains: Sequence[Sequence[int]], window: Sequence[Sequence[int]]
) -> list[Node]:
    """Root, the chains' trie, then the window row by row if it fits whole.

    Args:
        row: the request.
        chains: best first.
        window: rows R0..R_{N-2}, at least W entries each; (0, 0) is not read.
    """
    nodes = [Node(row.root, EMPTY, 0, ROOT)]
    trie = {(): 0}
    for chain in chains:
        for depth in range(1, len(chain) + 1):
            path = tuple(chain[:depth])
            if path not in trie and len(nodes) < row.max_nodes:
                trie[path] = len(nodes)
                nodes.append(Node(path[-1], trie[path[:-1]], depth, CANDIDATE))

    rows = range(row.n - 1)
    cells = [(r, j) for r in rows for j in range(row.w) if (r, j) != (0, 0)]
    if len(nodes) + len(cells) <= row.max_nodes:
        index = {(0, 0): 0}
        for r, j in cells:
            index[r, j] = len(nodes)
            parent = index[(0, j - 1) if r == 0 else (r - 1, j)]
            nodes.append(Node(window[r][j], parent, r + j, WINDOW))
    return nodes


def walk(
    nodes: Sequence[Node], sampled: Sequence[int], max_emitted: int
) -> tuple[list[int], list[int]]:
    """Sample and match: (tokens emitted, nodes they were sampled at)."""
    path = [0]
    while len(path) < max_emitted:
        here = path[-1]
        matching = [
            i
            for i, node in enumerate(nodes)
            if node.kind == CANDIDATE
            and node.parent == here
            and node.token == sampled[here]
        ]
        if not matching:
            break
        path += matching
    return [sampled[i] for i in path], path


class PaperWindow:
    """The Jacobi window of one request: paper, section 3.1 and Algorithm 2.

    `rows[0]` is R0 with an unused cell in front, so that `rows[r][j]` is cell (r, j).
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = [list(row) for row in rows]

    def step(self, before: int, root: int, new: Sequence[int]) -> list[list[int]]:
        """Harvest an n-gram (token before the key, key, values) per column; slide.

        Args:
            before: the token in front of the root.
            root: x.
            new: the model's token after each cell of the last row.
        """
        keys = [root, *self.rows[0][1:]]
        values = [*self.rows[1:], list(new)]
        ngrams = []
        for j, key in enumerate(keys):
            in_front = keys[j - 1] if j else before
            ngrams.append([in_front, key, *(row[j] for row in values)])
        self.rows = values
        return ngrams
