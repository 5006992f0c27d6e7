# SPDX-License-Identifier: Apache-2.0
"""Strategies that draft what followed the same tokens before, and no more."""

from collections.abc import Sequence

import numpy as np

from benchmarks.simulate.protocol import Answers, Request, Tree


class PromptLookup:
    """vLLM's `ngram` (`ngram_proposer._find_longest_matched_ngram_and_propose_tokens`).

    The earliest place where the longest suffix, of `least` to `most` tokens, was met.
    """

    reads_all_nodes = False

    def __init__(self, request: Request, least: int = 1, most: int = 5) -> None:
        self.text, self.least, self.most = list(request.text), least, most

    def draft(self, budget: int) -> Tree:
        text, tree = self.text, Tree.of(self.text[-1])
        best, after = self.least - 1, 0
        for end in range(1, len(text)):
            size = 0
            while (
                size < min(self.most, end) and text[end - 1 - size] == text[-1 - size]
            ):
                size += 1
            if size > best:
                best, after = size, end
        if after:
            tree.add_chain(text[after:], budget)
        return tree

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        self.text += [answers.sampled[node] for node in path]


class Suffix:
    """Suffix decoding (Oliaro et al. 2024), by Arctic Inference's own package."""

    reads_all_nodes = False

    def __init__(self, request: Request, factor: float = 1.0, least: float = 0.1):
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        # No other request's output is known: isolation as in the other strategies.
        self.cache = SuffixDecodingCache(max_tree_depth=24, max_cached_requests=0)
        self.cache.start_request(0, np.array(request.prompt, np.int32))
        self.cache.add_active_response(0, np.array([request.first], np.int32))
        self.text, self.factor, self.least = list(request.text), factor, least

    def draft(self, budget: int) -> Tree:
        tree = Tree.of(self.text[-1])
        draft = self.cache.speculate(
            0,
            np.array(self.text[-24:], np.int32),
            max_spec_tokens=budget - 1,
            max_spec_factor=self.factor,
            max_spec_offset=0.0 if self.factor == 1.0 else float(budget),
            min_token_prob=self.least,
            use_tree_spec=True,
        )
        nodes: list[int] = []
        for token, parent in zip(draft.token_ids, draft.parents, strict=True):
            nodes.append(tree.add(nodes[parent] if parent >= 0 else 0, token))
        return tree

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        new = [answers.sampled[node] for node in path]
        self.text += new
        self.cache.add_active_response(0, np.array(new, np.int32))


class LogitSpec:
    """LogitSpec (Liu et al. 2025), `generate_draft_tokens` of its repository.

    The likeliest tokens where the root was sampled are guessed to follow the root, and
    each, with the tokens before it, looks up how it goes on. Ranks bound how far.
    """

    reads_all_nodes = False
    MAX_NGRAM = 3
    AHEAD = 20

    def __init__(self, request: Request) -> None:
        self.text = list(request.text)
        self.last = request.prefill.ids[-1]

    def _follow(self, context: list[int]) -> list[int]:
        """What followed the longest n-gram that was met: the latest that is whole."""
        text, found, best = self.text, (0, 0, 0), 0
        for end in range(1, len(text)):
            size = 0
            while (
                size < min(self.MAX_NGRAM, end)
                and text[end - 1 - size] == context[-1 - size]
            ):
                size += 1
            if size:
                found = max(found, (size, min(self.AHEAD, len(text) - end), end))
        best = found[2]
        return text[best : best + self.AHEAD] if best else []

    def draft(self, budget: int) -> Tree:
        tree = Tree.of(self.text[-1])
        tree.add_chain(self._follow(self.text), budget)
        for rank, token in enumerate(self.last.tolist()):
            if len(tree.tokens) >= budget:
                break
            if token != self.text[-1]:
                length = 4 if rank <= 8 else 3 if rank <= 32 else 1
                chain = [token, *self._follow([*self.text, token])]
                tree.add_chain(chain[:length], budget)
        return tree

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        self.text += [answers.sampled[node] for node in path]
        self.last = answers.ids[path[-1]]
