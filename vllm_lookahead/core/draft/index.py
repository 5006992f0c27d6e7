# SPDX-License-Identifier: Apache-2.0
"""Find, among all that a request's pages hold, what came after the same tokens.

Every place in the pages is filed under its last token, its last two and its last three,
in a table of cells; the newest place takes a cell. A context is looked up by three
tokens, then two, then one. So a draft of any depth costs three looks, however long the
history is. Two contexts may share a cell: what is found is compared, and the older of
them is lost. The reference loses what the kernels lose, so that they can be compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_lookahead.core.answers import read_answers
from vllm_lookahead.core.batch import Request
from vllm_lookahead.core.pages import (
    CONTEXT,
    EMPTY,
    BlockPages,
    num_recent_blocks,
    until_empty,
)

# Cells of a table: eight for each token of text that there is room for, within bounds,
# for a place takes up to three.
MIN_CELLS, MAX_CELLS = 2**12, 2**16
# Of the one of answers: four for each that there is room for.
MIN_ANSWER_CELLS, MAX_ANSWER_CELLS = 2**10, 2**15


class Found(NamedTuple):
    """What came after the same tokens.

    Attributes:
        agreement: how many of them agree, 1 to CONTEXT.
        successors: tokens that may follow, and a figure of each: the log-probability of
            an answer's, 1 of what followed in the text.
    """

    agreement: int
    successors: dict[int, float]


class Index:
    """One table: from contexts to what came after them."""

    def __init__(self, num_cells: int) -> None:
        self.num_cells = num_cells
        self.cells: dict[int, tuple[Sequence[int], dict[int, float]]] = {}

    def file(self, context: Sequence[int], successors: dict[int, float]) -> None:
        """File what came after a context, the nearest of whose tokens is its first."""
        for length in range(1, len(context) + 1):
            at = cell_of(context[:length], self.num_cells)
            self.cells[at] = context, successors

    def find(self, context: Sequence[int]) -> Found | None:
        """What came after a context: the longest match, and of those the newest."""
        for length in range(len(context), 0, -1):
            filed = self.cells.get(cell_of(context[:length], self.num_cells))
            if filed and filed[0][:length] == context[:length]:
                return Found(length, filed[1])
        return None


def text_index(pages: BlockPages, request: Request) -> Index:
    """What followed what in recent n-grams and, newer than those, in the history."""
    index = Index(num_cells(len(request.blocks) * pages.block_size))
    sequences = [
        (gram, range(1, len(gram) - 1))
        for block in pages.recent_blocks(request)
        for gram in pages.ngrams(block)
    ]
    history = [*pages.history(request), request.root]
    sequences.append((history, range(len(history) - 1)))
    for tokens, places in sequences:
        for at in places:
            context, following = context_at(tokens, at), tokens[at + 1]
            if context and following != EMPTY:
                index.file(context, {following: 1.0})
    return index


def answer_index(pages: BlockPages, request: Request) -> Index:
    """What the model said where it read the request's last tokens, and its drafts."""
    index = Index(num_answer_cells(pages, len(request.blocks)))
    for context, successors in read_answers(pages, request):
        index.file(context, successors)
    return index


def context_at(tokens: Sequence[int], at: int) -> list[int]:
    """The last tokens up to a place, the nearest first, as far as they are known."""
    return until_empty(tokens[max(0, at + 1 - CONTEXT) : at + 1][::-1])


def num_cells(max_tokens: int) -> int:
    """Of a table that files so many tokens: a power of two."""
    return _power_of_two(8 * max_tokens, MIN_CELLS, MAX_CELLS)


def num_answer_cells(pages: BlockPages, max_blocks: int) -> int:
    """Of a table that files the answers of a request of so many blocks."""
    blocks = min(max_blocks, num_recent_blocks(pages.block_size))
    places = blocks * pages.answers.shape[1]
    return _power_of_two(4 * places, MIN_ANSWER_CELLS, MAX_ANSWER_CELLS)


def _power_of_two(least: int, low: int, high: int) -> int:
    """The next one up, within bounds."""
    return min(max(low, 1 << (least - 1).bit_length()), high)


def cell_of(context: Sequence[int], num_cells: int) -> int:
    """Where a context is filed, the nearest token first."""
    h = 0
    for token in context:
        h = ((h ^ token) + 0x9E3779B9) * 0x85EBCA6B % 2**32
        h ^= h >> 15
    return h % num_cells
