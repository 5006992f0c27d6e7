# SPDX-License-Identifier: Apache-2.0
"""Lookahead decoding as published, in plain Python.

Fu et al. 2024, Algorithm 2, as its reference implementation runs it (greedy, one
request): the window's first row is drawn from the prompt at random, N-2 warm-up
steps fill the others, the first of them with the prefill; then each step verifies
the pool's n-grams of the last token, at most G, the least recently inserted dropped
first. Three defects of that implementation are left out: a full match keeps its
bonus token, so up to N tokens come of a step; the history has the tokens
that were emitted; every EOS id ends a text (that is the caller's).
"""

import random
from collections.abc import Sequence

from benchmarks.simulate.protocol import Answers, Request, Tree


class PaperPool:
    """At most G n-grams per first token, in order of insertion."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: dict[int, list[tuple[int, ...]]] = {}

    def add(self, ngram: Sequence[int]) -> None:
        known = self.entries.setdefault(ngram[0], [])
        values = tuple(ngram[1:])
        if values in known:
            known.remove(values)
        known.append(values)
        del known[: -self.capacity]


class Paper:
    """One request, with the n-grams of its text in the pool.

    Attributes:
        text: prompt and output; the last token is the root.
        rows: the window, filled rows only. Row 0 lacks column 0, the root's.
    """

    reads_all_nodes = True

    def __init__(self, request: Request, sizes: tuple[int, int, int]) -> None:
        """
        Args:
            sizes: W, N and G.
        """
        window_size, self.n, verification_set_size = sizes
        self.text = list(request.prompt)
        self.pool = PaperPool(verification_set_size)
        for start in range(len(self.text) - self.n + 1):
            self.pool.add(self.text[start : start + self.n])
        draw = random.Random(request.seed)
        first = [draw.choice(self.text) for _ in range(window_size + self.n - 3)]
        self.rows: list[list[int]] = [first]
        tree = self.draft(0)  # goes with the prefill
        self._advance(request.ask(len(self.text) - 1, tree).sampled)

    @property
    def is_warm(self) -> bool:
        return len(self.rows) == self.n - 1

    def draft(self, budget: int) -> Tree:
        """All of it, whatever the budget."""
        tokens, parents = [self.text[-1]], [-1]

        def add(token: int, parent: int) -> int:
            tokens.append(token)
            parents.append(parent)
            return len(tokens) - 1

        self.chains: list[list[int]] = []  # nodes of each candidate
        if self.is_warm:
            for values in self.pool.entries.get(self.text[-1], []):
                chain = [0]
                for token in values:
                    chain.append(add(token, chain[-1]))
                self.chains.append(chain[1:])
        above = [0]
        for token in self.rows[0]:
            above.append(add(token, above[-1]))
        for row in self.rows[1:]:
            above = [add(t, parent) for t, parent in zip(row, above, strict=True)]
        self.last_row = above
        self.tokens = tokens
        return Tree(tokens, parents, 1 + sum(map(len, self.chains)))

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        assert len(self._advance(answers.sampled)) == len(path)

    def _advance(self, sampled: Sequence[int]) -> list[int]:
        """Verify, harvest, slide.

        Args:
            sampled: the model's token after each node.

        Returns:
            The nodes that tokens were emitted at.
        """
        path = [0]
        for chain in self.chains:
            matched = [0]
            for node in chain:
                if self.tokens[node] != sampled[matched[-1]]:
                    break
                matched.append(node)
            path = max(path, matched, key=len)
        new = [sampled[node] for node in self.last_row]
        if self.is_warm:
            keys = [self.text[-1], *self.rows[0]]
            for ngram in zip(keys, *self.rows[1:], new, strict=True):
                self.pool.add(ngram)
            self.rows = [*self.rows[1:], new]
            self.rows[0] = self.rows[0][1:]
        else:
            self.rows = [row[1:] for row in (*self.rows, new)]
        emitted = [sampled[node] for node in path]
        for token in emitted:
            self.text.append(token)
            if len(self.text) >= self.n:
                self.pool.add(self.text[-self.n :])
        return path
