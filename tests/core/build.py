# SPDX-License-Identifier: Apache-2.0
"""Small builders: pages, batches and trees from Python lists, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import CONTEXT, EMPTY, NUM_ANSWERS, BlockPages
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, DraftTree, Node
from vllm_lookahead.params import LookaheadParams


@dataclass
class Row:
    """One request of a batch: a row of `RequestBatch`, with N of the pages."""

    blocks: list[int]
    position: int
    root: int
    w: int = 0
    n: int = 4
    g: int = 4
    max_nodes: int = 10_000


def ints(values: Sequence) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_pages(num_blocks: int, block_size: int, w: int, n: int) -> BlockPages:
    device = torch.get_default_device()
    params = LookaheadParams(
        w, n, -(-15 // (n - 1))
    )  # as many answers as are ever kept
    return BlockPages.allocate(num_blocks, block_size, params, device)


def clone_pages(pages: BlockPages) -> BlockPages:
    return BlockPages(*(getattr(pages, f.name).clone() for f in fields(pages)))


def make_batch(rows: Sequence[Row], filler: int = 0) -> RequestBatch:
    """Block tables are padded with `filler`, a block that is not the request's."""
    columns = max(len(row.blocks) for row in rows)
    tables = [row.blocks + [filler] * (columns - len(row.blocks)) for row in rows]
    return RequestBatch(
        block_table=ints(tables),
        position=ints([row.position for row in rows]),
        root=ints([row.root for row in rows]),
        window_size=ints([row.w for row in rows]),
        ngram_size=ints([row.n for row in rows]),
        verification_set_size=ints([row.g for row in rows]),
        max_nodes=ints([row.max_nodes for row in rows]),
    )


def write(
    ops: LookaheadOps,
    pages: BlockPages,
    blocks: Sequence[int],
    tokens: Sequence[int],
    start: int = 0,
) -> None:
    """Record tokens at positions start, start+1, ... of a block table."""
    size = pages.block_size
    positions = range(start, start + len(tokens))
    slots = [blocks[at // size] * size + at % size for at in positions]
    ops.write_tokens(pages, torch.tensor(slots, dtype=torch.int64), ints(list(tokens)))


def put_in_ring(pages: BlockPages, block: int, ngrams: Sequence[Sequence[int]]) -> None:
    """Fill a block's ring with (token before the key, key, values...), oldest first.

    Short n-grams are padded with EMPTY.
    """
    width = pages.ring.shape[2]
    for at, ngram in enumerate(ngrams):
        padded = [*ngram, *[EMPTY] * (width - len(ngram))]
        pages.ring[block, at] = ints(padded)
    pages.ring_count[block] = len(ngrams)


def put_answers(
    pages: BlockPages,
    block: int,
    answers: Sequence[tuple[Sequence[int], dict[int, float]]],
) -> None:
    """Fill a block's ring of answers, oldest first.

    Args:
        answers: (the last tokens as they stand in the text, log-probability of each
            token that may follow). Short ones are padded with EMPTY.
    """
    for at, (text, successors) in enumerate(answers):
        nearest_first = [*text[::-1], *[EMPTY] * CONTEXT][:CONTEXT]
        missing = NUM_ANSWERS - len(successors)
        tokens, logprobs = [*successors], [*successors.values()]
        pages.answers[block, at] = ints([*nearest_first, *tokens, *[EMPTY] * missing])
        pages.answer_logprobs[block, at] = torch.tensor([*logprobs, *[0.0] * missing])
    pages.answer_count[block] = len(answers)


def make_hints(num_requests: int = 1, n: int = 4, **given: Any) -> Hints:
    """Hints of nothing, but for what is given; N of the server."""
    nothing = Hints(
        bigrams=torch.zeros(0, 0, dtype=torch.int32),
        bigram_logprobs=torch.zeros(0, 0),
        temperature=torch.zeros(num_requests),
        seeds=torch.zeros(num_requests, n - 1, dtype=torch.int64),
        noise=cpu_noise,
    )
    return replace(nothing, **given)


def draft(
    ops: LookaheadOps,
    pages: BlockPages,
    batch: RequestBatch,
    max_candidates: int,
    **given: Any,
) -> DraftTree:
    """The trees alone, from the pages and the hints that are given.

    Args:
        max_candidates: G of the server, of no request more.
    """
    assert batch.verification_set_size.max() <= max_candidates
    hints = make_hints(len(batch.root), pages.ngram_size, **given)
    tree, _ = ops.draft(pages, batch, hints, max_candidates)
    return tree


def candidates(
    ops: LookaheadOps, pages: BlockPages, row: Row, **given: Any
) -> dict[tuple[int, ...], float]:
    """Branches below a request's root, the likeliest first, and their chances."""
    hints = make_hints(1, pages.ngram_size, **given)
    tree, chances = ops.draft(pages, make_batch([row]), hints, row.g)
    (nodes,) = tree.nodes()
    return {
        tuple(nodes[k].token for k in path_to(nodes, i)[1:]): float(chances[0, i])
        for i, node in enumerate(nodes)
        if node.kind == CANDIDATE
    }


def make_tree(trees: Sequence[Sequence[Node]]) -> DraftTree:
    """Lists of nodes as one `DraftTree`, as wide as the largest."""
    return DraftTree.of(trees, max(map(len, trees)))


def path_to(nodes: Sequence[Node], index: int) -> list[int]:
    """Node indices from the root to a node, both included."""
    path = [index]
    while nodes[path[-1]].parent != EMPTY:
        path.append(nodes[path[-1]].parent)
    return path[::-1]
