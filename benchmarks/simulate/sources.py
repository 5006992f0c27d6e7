# SPDX-License-Identifier: Apache-2.0
"""What is known of the token after a path, source by source.

Each term of evidence is a name and, of the tokens that it speaks for, by how much: a
log-probability above FLOOR, or a count. Tokens that it does not name have 0, as all
other tokens together have. `forest.py` adds the terms up with weights that are fitted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from benchmarks.simulate.protocol import Answers, Request, Tree

Row = dict[int, float]
# Log-probability that says as little of a token as not naming it.
FLOOR = -8.0
# Tokens before the last one by which places are told apart.
MAX_AGREEMENT = 4
# Likeliest tokens read of logits that are at hand in full.
MOST_READ = 32
# Places looked at, the newest first.
MAX_PLACES = 64


def row(ids: np.ndarray, logprobs: np.ndarray, most: int) -> Row:
    """The likeliest tokens, as much as they are above FLOOR."""
    return {
        token: x - FLOOR
        for token, x in zip(ids[:most].tolist(), logprobs[:most].tolist(), strict=True)
        if x > FLOOR and token >= 0
    }


@dataclass
class Options:
    """Which sources are on.

    Attributes:
        history: what followed the last token in prompt and output.
        bigrams: the model's successors of a token alone.
        alone: those successors are of a token that nothing precedes.
        noise: the sampler's.
        rejected: logits of the last step's rejected nodes at the same depth.
        alternatives: R, likeliest tokens kept beside each place of the text; 0: none.
        prompt_alternatives: whether the prompt's places have them too.
        by_context: places of the text whose alternatives are read are those that agree
            furthest; otherwise the latest of the token.
        recycled: keep the answers of all fed nodes by their last 1, 2 and 3 tokens.
        last: the logits where the root was sampled (LogitSpec).
        window: the tokens sampled at rejected nodes, as a Jacobi window's row.
    """

    history: bool = True
    bigrams: bool = True
    alone: bool = False
    noise: bool = True
    rejected: bool = True
    alternatives: int = 8
    prompt_alternatives: bool = True
    by_context: bool = True
    recycled: bool = True
    last: bool = True
    window: bool = False


@dataclass
class Knowledge:
    """Of one request, kept from step to step.

    Attributes:
        text: prompt and output, the last token being the root.
        places: of each token, where it is in the text, the oldest first.
        beside: alternatives of each place of the text, that of the root excepted.
        by_tokens: answers of fed nodes by their last tokens.
        wrong: of each depth, (token, its full answer) of the rejected nodes there.
    """

    request: Request
    options: Options
    text: list[int] = field(default_factory=list)
    places: dict[int, list[int]] = field(default_factory=dict)
    beside: list[Row] = field(default_factory=list)
    by_tokens: dict[tuple[int, ...], Row] = field(default_factory=dict)
    wrong: dict[int, list[tuple[int, int, np.ndarray, np.ndarray]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        self._bigrams: dict[int, Row] = {}
        for token in self.request.text:
            self._append(token)
        prefill = self.request.prefill
        kept = self.options.alternatives
        for at, (ids, logprobs) in enumerate(
            zip(prefill.ids, prefill.logprobs, strict=True)
        ):
            on = self.options.prompt_alternatives or at == len(prefill.ids) - 1
            self.beside.append(row(ids, logprobs, kept) if on else {})
        if self.options.recycled and self.options.prompt_alternatives:
            for at in range(len(self.request.prompt)):
                self._recycle(self.request.prompt[: at + 1], self.beside[at])
        self.last = row(prefill.ids[-1], prefill.logprobs[-1], MOST_READ)

    def _append(self, token: int) -> None:
        self.places.setdefault(token, []).append(len(self.text))
        self.text.append(token)

    def _recycle(self, context: list[int], answer: Row) -> None:
        for size in range(1, min(3, len(context)) + 1):
            self.by_tokens[tuple(context[-size:])] = answer

    def learn(self, tree: Tree, answers: Answers, path: list[int]) -> None:
        """The last step's trees and answers."""
        kept, before = self.options.alternatives, self.text[-3:]
        paths = tree.paths()
        accepted = set(path)
        if self.options.recycled:
            # What was accepted is learnt last: it overwrites the rest.
            order = sorted(range(len(paths)), key=lambda i: (i in accepted, -i))
            for i in order:
                if answers.sampled[i] >= 0:
                    answer = row(answers.ids[i], answers.logprobs[i], kept)
                    self._recycle([*before, *paths[i]], answer)
        self.wrong = {}
        for i, tokens in enumerate(paths):
            depth = len(tokens) - len(path)
            if depth >= 0 and i not in accepted and answers.sampled[i] >= 0:
                place = self.wrong.setdefault(depth, [])
                place.append(
                    (
                        tree.tokens[i],
                        answers.sampled[i],
                        answers.ids[i],
                        answers.logprobs[i],
                    )
                )
        for node in path:
            ids, logprobs = answers.ids[node], answers.logprobs[node]
            self.beside.append(row(ids, logprobs, kept))
            self._append(answers.sampled[node])
        self.last = row(answers.ids[path[-1]], answers.logprobs[path[-1]], MOST_READ)

    def bigrams(self, token: int) -> Row:
        known = self._bigrams.get(token)
        if known is None:
            request = self.request
            table = request.alone if self.options.alone else request.after
            known = row(table.ids[token], table.logprobs[token], len(table.ids[token]))
            self._bigrams[token] = known
        return known

    def evidence(self, path: list[int]) -> Iterator[tuple[str, Row]]:
        """Terms for the token after the root and a path below it."""
        options = self.options
        context = [*self.text[-MAX_AGREEMENT - 1 :], *path]
        last, depth = context[-1], len(path)
        if options.bigrams:
            yield "bigram", self.bigrams(last)
        found = self._matches(context)
        if options.history and found:
            latest, furthest = found[0]
            yield f"copy{furthest}", {self.text[latest + 1]: 1.0}
            counts: Row = {}
            agreement: Row = {}
            for at, agreed in found:
                token = self.text[at + 1]
                counts[token] = counts.get(token, 0) + 1
                agreement[token] = max(agreement.get(token, 0), agreed)
            yield "count", {t: math.log(1 + 2 * n) for t, n in counts.items()}
            yield "agreement", agreement
        if options.alternatives and found:
            at, agreed = found[0] if options.by_context else (max(found)[0], 0)
            if self.beside[at]:
                yield f"beside{min(agreed, 3)}", self.beside[at]
        if options.recycled:
            for size in range(min(3, len(context)), 0, -1):
                answer = self.by_tokens.get(tuple(context[-size:]))
                if answer:
                    yield f"recycled{size}", answer
                    break
        if options.last:
            yield "last0" if depth == 0 else "last1", self.last
        if depth in self.wrong:
            yield from self._at_the_place(self.wrong[depth], last)

    def _matches(self, context: list[int]) -> list[tuple[int, int]]:
        """Places of the last token and their agreement, the furthest first."""
        text, found = self.text, []
        end = len(text) - 1  # nothing is known to follow the root
        for at in reversed(self.places.get(context[-1], [])[-MAX_PLACES:]):
            if at >= end:
                continue
            agreed = 0
            while (
                agreed < min(MAX_AGREEMENT, at, len(context) - 1)
                and text[at - 1 - agreed] == context[-2 - agreed]
            ):
                agreed += 1
            found.append((at, agreed))
        found.sort(key=lambda match: -match[1])  # stable: the newest stay first
        return found

    def _at_the_place(
        self, wrong: list[tuple[int, int, np.ndarray, np.ndarray]], last: int
    ) -> Iterator[tuple[str, Row]]:
        same = [node for node in wrong if node[0] == last]
        token, sampled, ids, logprobs = (same or wrong)[0]
        if self.options.rejected:
            answer = row(ids, logprobs, MOST_READ)
            if same:
                yield "same", answer
            else:
                usual = self.bigrams(token)
                yield "place", answer
                yield "usual", {t: x for t, x in usual.items() if t in answer}
        if self.options.window:
            yield "window", {sampled: 1.0}
