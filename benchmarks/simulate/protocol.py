# SPDX-License-Identifier: Apache-2.0
"""What a drafting strategy is given, and what it gives."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass
class Tree:
    """Nodes in the order added; the root first, siblings with distinct tokens.

    Attributes:
        tokens, parents: [T]; parents[i] < i, and -1 at the root.
        num_verified: nodes that may be accepted; those behind them are a window's.
        children: [T], node of each child by its token.
    """

    tokens: list[int]
    parents: list[int]
    num_verified: int | None = None
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])

    @classmethod
    def of(cls, root: int) -> "Tree":
        return cls([root], [-1])

    def add(self, parent: int, token: int) -> int:
        """The child of this token, which may be there already."""
        known = self.children[parent].get(token)
        if known is not None:
            return known
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.children.append({})
        self.children[parent][token] = node
        return node

    def add_chain(self, chain: Iterable[int], budget: int, parent: int = 0) -> None:
        """A path below a node, as far as there is room in `budget` nodes."""
        for token in chain:
            if len(self.tokens) >= budget and token not in self.children[parent]:
                return
            parent = self.add(parent, token)

    def walk(self, sampled: Sequence[int]) -> list[int]:
        """The longest path whose every token was sampled at its parent: its nodes."""
        paths: dict[int, list[int]] = {0: [0]}
        for node in range(1, len(self.tokens))[: (self.num_verified or 1 << 30) - 1]:
            path = paths.get(self.parents[node])
            if path is not None and sampled[path[-1]] == self.tokens[node]:
                paths[node] = [*path, node]
        return max(paths.values(), key=len)

    def paths(self) -> list[list[int]]:
        """Tokens from below the root to each node."""
        paths: list[list[int]] = [[]]
        for token, parent in zip(self.tokens[1:], self.parents[1:], strict=True):
            paths.append([*paths[parent], token])
        return paths


@dataclass
class Answers:
    """What the model says after each of T nodes.

    Attributes:
        sampled: [T], the sampler's token.
        ids, logprobs: [T, K], the likeliest tokens. Rows of a token -1 were not asked.
    """

    sampled: list[int]
    ids: np.ndarray
    logprobs: np.ndarray


class NoiseOf(Protocol):
    def __getitem__(self, number: int) -> np.ndarray:
        """[V] noise that is added before the output's token of this number."""


@dataclass
class Bigrams:
    """Successors of each token by the model, where they were asked for.

    Attributes:
        ids: [V, R] int32, the likeliest first; -1 where they are not known.
        logprobs: [V, R] float32.
    """

    ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class Request:
    """What is known when the drafting begins.

    Attributes:
        prompt: its tokens.
        first: the prefill's token, the first root.
        prefill: answers after each token of the prompt.
        temperature: 0 for greedy.
        noise: the sampler's.
        seeds: what the noise is keyed by.
        alone: bigrams of each token alone, as the engine asks for them.
        after: bigrams of each token after a token of punctuation.
        max_tokens: of the output.
        ask: answers all nodes of a tree below the token at a position.
        seed: of a strategy's own draws.
    """

    prompt: list[int]
    first: int
    prefill: Answers
    temperature: float
    noise: NoiseOf
    seeds: np.ndarray
    alone: Bigrams
    after: Bigrams
    max_tokens: int
    ask: Callable[[int, Tree], Answers]
    seed: int = 0
    text: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.text = [*self.prompt, self.first]


class Strategy(Protocol):
    """Drafts for one request.

    Attributes:
        reads_all_nodes: whether `accept` reads answers off the accepted path.
    """

    reads_all_nodes: bool

    def draft(self, budget: int) -> Tree:
        """At most `budget` nodes, the root among them."""

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        """The last tree's answers, and the nodes whose samples were emitted."""
