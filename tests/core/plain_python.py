# SPDX-License-Identifier: Apache-2.0
"""Parts of the core once more, for one request: written from the docstrings alone."""

import math
from collections.abc import Iterable, Mapping, Sequence

from tests.core.build import Row
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, Node


def chances_of(scores: Sequence[float], other: float) -> list[float]:
    """A softmax in which all other tokens count as one.

    Args:
        scores: of the tokens that something speaks for.
        other: score of all the others.
    """
    total = math.exp(other) + sum(map(math.exp, scores))
    return [math.exp(score) / total for score in scores]


def followed(
    texts: Iterable[tuple[Sequence[int], int]], context: Sequence[int]
) -> tuple[int, int] | None:
    """(how many tokens agree, the token that came after them): most, then newest.

    Args:
        texts: oldest first; of each its tokens, EMPTY where unknown, and the first of
            them that counts as what something came after.
        context: last tokens, EMPTY where unknown; as many may agree.
    """
    found = None
    for text, first in texts:
        for at in range(first, len(text) - 1):
            agree = 0
            while (
                agree < min(len(context), at + 1)
                and text[at - agree] == context[-1 - agree] != EMPTY
            ):
                agree += 1
            if agree and text[at + 1] != EMPTY and (found is None or agree >= found[0]):
                found = agree, text[at + 1]
    return found


def draft_tree(
    row: Row,
    branches: Mapping[tuple[int, ...], float],
    window: Sequence[Sequence[int]],
) -> list[Node]:
    """Root, the likeliest branches, then the window row by row if it fits whole.

    Args:
        row: the request.
        branches: the chance of each, every prefix of one among them.
        window: rows R0..R_{N-2}, at least W entries each; (0, 0) is not read.
    """
    nodes = [Node(row.root, EMPTY, 0, ROOT)]
    index_of = {(): 0}
    ranked = sorted(branches, key=lambda path: (-branches[path], len(path)))
    for path in ranked[: row.max_nodes - 1]:
        index_of[path] = len(nodes)
        nodes.append(Node(path[-1], index_of[path[:-1]], len(path), CANDIDATE))

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
