# SPDX-License-Identifier: Apache-2.0
"""The Jacobi window as drafts: fed to be refilled, not to be verified.

Fu et al. 2024, section 3.1. The window starts full: cells that were never written are
seeded with runs of the request's own history, which stands in for the paper's N-2
warm-up steps.
"""

from vllm_lookahead.core.batch import Request
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import WINDOW, Node

# Consecutive columns start this far apart in the history: a prime, so that few
# columns coincide whatever its length.
SEED_STRIDE = 7919


def read_window(pages: BlockPages, request: Request) -> list[list[int]]:
    """Rows R0..R_{N-2} of W tokens; cell (0, 0) is the root's place and means nothing.

    The window is in the page of the block of position p-1.
    """
    p, size = request.position, pages.block_size
    history = pages.history(request)
    tail = request.slot(max(p - 1, 0), size) // size
    stored = pages.window[tail].tolist()
    rows = []
    for r in range(request.ngram_size - 1):
        row = []
        for j in range(request.window_size):
            token = stored[r][j]
            if token == EMPTY and history:
                token = history[(j * SEED_STRIDE + r) % p]
            row.append(request.root if token == EMPTY else token)
        rows.append(row)
    return rows


def add_window(
    nodes: list[Node], window: list[list[int]], max_nodes: int
) -> list[Node]:
    """The nodes with the window behind them, if it fits whole.

    Row 0 runs along the columns, the other rows down from the row above.

    Args:
        nodes: the root and the candidates.
        window: as `read_window` gives it.
        max_nodes: of the tree.
    """
    cells = [(r, j) for r, row in enumerate(window) for j in range(len(row))][1:]
    if len(nodes) + len(cells) > max_nodes:
        return nodes
    nodes, place = list(nodes), {(0, 0): 0}
    for r, j in cells:
        place[r, j] = len(nodes)
        parent = place[(r - 1, j) if r else (0, j - 1)]
        nodes.append(Node(window[r][j], parent, r + j, WINDOW))
    return nodes
