# SPDX-License-Identifier: Apache-2.0
"""After a step: record the output, harvest the Jacobi window, slide it by a row.

Fu et al. 2024, section 3.1 and Algorithm 2. Column j's n-gram is key B0[j] and values
R1[j], ..., R_{N-2}[j], new[j], where B0 is the root and then R0, and new[j] is the
model's token after node (N-2, j).
"""

import torch

from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import WINDOW, DraftTree, Node
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.core.write import write_tokens


def update(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    sampled: torch.Tensor,
    verdict: Verdict,
) -> None:
    """Leave in the pages what the step has found.

    The window, new or kept, goes to the page of the new tail block. A request whose
    tree carries no whole window keeps its own.

    Args:
        pages: written in place.
        batch: the requests as they were when the tree was built.
        tree: as fed.
        sampled: [B, T] integers, the model's token after each node.
        verdict: what was emitted.
    """
    emitted, counts = verdict.tokens.tolist(), verdict.num_emitted.tolist()
    trees, answers = tree.nodes(), sampled.tolist()
    for b, request in enumerate(batch.requests()):
        # The last token emitted is the next root: its K/V is not computed yet.
        final = emitted[b][: counts[b] - 1]
        ahead = range(request.position + 1, request.position + 1 + len(final))
        slots = [request.slot(at, pages.block_size) for at in ahead]
        as_slots = torch.tensor(slots, dtype=torch.int64)
        write_tokens(pages, as_slots, torch.tensor(final, dtype=torch.int64))
        _update_window(pages, request, trees[b], answers[b], counts[b])


def _update_window(
    pages: BlockPages,
    request: Request,
    nodes: list[Node],
    sampled: list[int],
    num_emitted: int,
) -> None:
    w, last = request.window_size, request.ngram_size - 2
    if not w:
        return
    size = pages.block_size
    old_tail = request.slot(request.position - 1, size) // size
    tail = request.slot(request.position + num_emitted - 1, size) // size
    num_cells = w * (last + 1) - 1  # with nodes of their own
    # With W = 1 and N = 2 the window is the root: fed whole, whatever is fed.
    if sum(node.kind == WINDOW for node in nodes) != num_cells:
        if tail != old_tail:
            pages.window[tail] = pages.window[old_tail]
        return

    first = len(nodes) - num_cells

    def node(row: int, column: int) -> int:
        cell = row * w + column
        return first + cell - 1 if cell else 0

    rows = [[nodes[node(r, j)].token for j in range(w)] for r in range(last + 1)]
    new = [sampled[node(last, j)] for j in range(w)]
    slid = [*rows[1:], new]
    before = [int(pages.tokens.view(-1)[request.slot(request.position - 1, size)])]
    before += rows[0][:-1]
    pages.window[tail] = EMPTY
    for j in range(w):
        values = [row[j] for row in slid]
        ngram = [before[j], rows[0][j], *values]
        count = int(pages.ring_count[tail])
        entry = pages.ring[tail, count % pages.ring.shape[1]]
        entry[:] = EMPTY
        entry[: len(ngram)] = torch.tensor(ngram, dtype=torch.int32)
        pages.ring_count[tail] = count + 1
        pages.window[tail, : len(values), j] = torch.tensor(values, dtype=torch.int32)
