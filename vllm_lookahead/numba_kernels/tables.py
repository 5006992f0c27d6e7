# SPDX-License-Identifier: Apache-2.0
"""What is filed of each request from step to step, so that a step files what is new.

The tables are those of `core.draft.index`. They hold places, and what is found there is
compared: a page that has changed since costs a draft, nothing else.
"""

from collections.abc import Hashable, Iterable

import numpy as np

from vllm_lookahead.core.draft.index import num_answer_cells, num_cells
from vllm_lookahead.core.pages import BlockPages


class Tables:
    """A table of text and one of answers for each request.

    Attributes:
        text, answers: [rows, cells] int32.
        filed: [rows, 3] int64: tokens of the text that are filed, 0 where nothing is;
            the last block of which answers are filed, and how many of it.
        rows: [B] int64, those of the requests chosen.
    """

    def __init__(self) -> None:
        self.text, self.answers = np.empty((2, 0, 0), np.int32)
        self.filed = np.empty((0, 3), np.int64)
        self.rows = np.empty(0, np.int64)
        self._row_of: dict[Hashable, int] = {}
        self._free: list[int] = []

    def choose(
        self, requests: Iterable[Hashable], pages: BlockPages, num_blocks: int
    ) -> None:
        """Make `rows` those of some requests, new ones among them.

        Args:
            requests: B of them.
            pages: theirs.
            num_blocks: of the longest block table.
        """
        requests = list(requests)
        for request in requests:
            if request not in self._row_of:
                row = self._free.pop() if self._free else len(self._row_of)
                self._row_of[request] = row
        cells = num_cells(num_blocks * pages.block_size)
        answer_cells = num_answer_cells(pages, num_blocks)
        if (
            len(self.filed) < len(self._row_of) + len(self._free)
            or self.text.shape[1] < cells
            or self.answers.shape[1] < answer_cells
        ):
            num_rows = max(len(self.filed), 1 << (len(self._row_of) - 1).bit_length())
            cells = max(cells, self.text.shape[1])
            answer_cells = max(answer_cells, self.answers.shape[1])
            self.text = np.empty((num_rows, cells), np.int32)
            self.answers = np.empty((num_rows, answer_cells), np.int32)
            self.filed = np.zeros((num_rows, 3), np.int64)
        self.rows = np.array([self._row_of[request] for request in requests])

    def remove(self, request: Hashable) -> None:
        """A request has ended."""
        if (row := self._row_of.pop(request, None)) is not None:
            self.filed[row] = 0
            self._free.append(row)
