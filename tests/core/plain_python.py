# SPDX-License-Identifier: Apache-2.0
"""The core once more, in plain Python, for one request: what tests compare with.

Written from the design brief (sections 3 and 4) and the docstrings, not from the
tensor code.
"""

from collections.abc import Sequence

from tests.core.build import Node, Row
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.pool import ENTRIES_PER_CANDIDATE, MAX_CONTEXT
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW


def history_of(pages: BlockPages, row: Row) -> list[int]:
    """Tokens at positions 0..p-1, EMPTY where unknown."""
    size = pages.block_size
    tokens = pages.tokens.tolist()
    return [tokens[row.blocks[at // size]][at % size] for at in range(row.position)]


def ring_of(pages: BlockPages, block: int) -> list[list[int]]:
    """A block's Jacobi n-grams (token before the key, key, values), oldest first."""
    size = pages.ring.shape[1]
    count = int(pages.ring_count[block])
    ring = pages.ring[block].tolist()
    return [ring[at % size] for at in range(max(0, count - size), count)]


def until_empty(tokens: Sequence[int]) -> list[int]:
    return [*tokens, EMPTY][: [*tokens, EMPTY].index(EMPTY)]


def pool_entries(pages: BlockPages, row: Row) -> list[list[int]]:
    """Every continuation of the root that the pages know, best first."""
    p, n = row.position, row.n
    text = [*history_of(pages, row), row.root]
    found = []  # (context, block, 0 for the ring or 1 for the slots, order), values
    for at in range(p):
        if text[at] != row.root:
            continue
        context = 0
        while (
            context < min(MAX_CONTEXT, at)
            and text[at - 1 - context] == text[p - 1 - context] != EMPTY
        ):
            context += 1
        values = until_empty(text[at + 1 : at + n])
        found.append(((context, at // pages.block_size, 1, at), values))
    num_live = -(-p // pages.block_size)
    for logical in range(num_live):
        for order, entry in enumerate(ring_of(pages, row.blocks[logical])):
            before, key, *values = entry
            if key == row.root:
                context = int(before == text[p - 1] != EMPTY)
                values = until_empty(values[: n - 1])
                found.append(((context, logical, 0, order), values))
    found.sort(reverse=True)
    return [values for _, values in found]


def lookup(pages: BlockPages, row: Row, max_candidates: int) -> list[list[int]]:
    """At most G distinct chains for the root, best first."""
    chains: list[list[int]] = []
    entries = pool_entries(pages, row)
    for values in entries[: max_candidates * ENTRIES_PER_CANDIDATE]:
        known = any(values == earlier[: len(values)] for earlier in chains)
        if values and not known and len(chains) < row.g:
            chains.append(values)
    return chains


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
