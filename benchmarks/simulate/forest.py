# SPDX-License-Identifier: Apache-2.0
"""Trees grown by an estimate of acceptance that all sources of drafts add to.

The weighted sum of the evidence for a token, `sources.py`, with the sampler's noise, is
its score; the softmax of the scores, in which all tokens that nothing speaks for count
as one, is its chance after its parent. A node's chance is the product on its path.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.simulate.protocol import Answers, Request, Tree
from benchmarks.simulate.sources import Knowledge, Options, Row

Weights = Mapping[str, float]
# Where nothing was fitted yet.
START = {
    "bigram": 0.3,
    **{f"copy{i}": 1.0 for i in range(5)},
    "count": 0.5,
    "agreement": 0.4,
    **{f"beside{i}": 0.3 for i in range(4)},
    **{f"recycled{i}": 0.4 for i in range(1, 4)},
    "last0": 0.1,
    "last1": 0.1,
    "same": 0.3,
    "place": 0.2,
    "usual": -0.1,
    "window": 0.5,
    "noise": 0.6,
    "other": 3.0,
    "other by temperature": 1.0,
    "other by depth": 0.0,
}
MAX_DEPTH = 12


class Forest:
    """Best first, or by levels: a beam of the likeliest nodes each, all tried anew.

    Attributes:
        chances: log-chance of each node of the last tree.
    """

    def __init__(
        self,
        request: Request,
        options: Options,
        weights: Weights,
        beam: int | None = None,
        successors: int | None = None,
    ) -> None:
        """
        Args:
            beam: most nodes per level that get children; None grows best first.
            successors: R, most children of a node.
        """
        self.known = Knowledge(request, options)
        self.weights, self.request = weights, request
        self.reads_all_nodes = options.recycled or options.rejected or options.window
        self.beam, self.successors = beam, successors

    def evidence(self, path: list[int]) -> Iterable[tuple[str, Row]]:
        return self.known.evidence(path)

    @property
    def reads_noise(self) -> bool:
        return self.known.options.noise

    @property
    def number(self) -> int:
        """Of the output's token that follows the root."""
        return len(self.known.text) - len(self.request.prompt)

    def others(self, depth: int) -> float:
        """Score of all the tokens that nothing speaks for."""
        weights, temperature = self.weights, self.request.temperature
        return (
            weights["other"]
            + weights["other by temperature"] * temperature
            + weights["other by depth"] * min(depth, 4)
        )

    def estimate(self, path: list[int]) -> list[tuple[float, int]]:
        """(log-probability, token) of what may follow, the likeliest first."""
        scores: dict[int, float] = {}
        for name, row in self.known.evidence(path):
            weight = self.weights[name]
            for token, x in row.items():
                scores[token] = scores.get(token, 0.0) + weight * x
        temperature = self.request.temperature
        if temperature > 0 and self.known.options.noise:
            noise = self.request.noise[self.number + len(path)]
            weight = self.weights["noise"] * temperature
            for token in scores:
                scores[token] += weight * float(noise[token])
        other = self.others(len(path))
        most = max(other, *scores.values()) if scores else other
        total = math.exp(other - most) + sum(
            math.exp(x - most) for x in scores.values()
        )
        log_total = most + math.log(total)
        ranked = sorted(((x - log_total, t) for t, x in scores.items()), reverse=True)
        return ranked[: self.successors]

    def draft(self, budget: int) -> Tree:
        grow = self._best_first if self.beam is None else self._by_levels
        self.tree, self.chances = grow(budget)
        return self.tree

    def _best_first(self, budget: int) -> tuple[Tree, list[float]]:
        tree, chances = Tree.of(self.root), [0.0]
        paths: list[list[int]] = [[]]
        waiting: list[tuple[float, int, int]] = []
        while True:
            node = len(tree.tokens) - 1
            if len(paths[node]) < MAX_DEPTH:
                for x, token in self.estimate(paths[node]):
                    waiting.append((chances[node] + x, node, token))
            waiting.sort(key=lambda item: item[0])
            del waiting[:-budget]
            if len(tree.tokens) >= budget or not waiting:
                return tree, chances
            chance, parent, token = waiting.pop()
            tree.add(parent, token)
            chances.append(chance)
            paths.append([*paths[parent], token])

    def _by_levels(self, budget: int) -> tuple[Tree, list[float]]:
        """All children of each level's likeliest nodes, then the best of them all."""
        assert self.beam is not None
        level: list[tuple[float, list[int]]] = [(0.0, [])]
        every: list[tuple[float, list[int]]] = []
        for _ in range(MAX_DEPTH):
            children = [
                (chance + x, [*path, token])
                for chance, path in level
                for x, token in self.estimate(path)
            ]
            children.sort(key=lambda child: -child[0])
            every += children[: budget - 1]
            level = children[: self.beam]
        # A child's path is longer than its equally likely parent's.
        every.sort(key=lambda node: (-node[0], len(node[1])))
        tree, chances = Tree.of(self.root), [0.0]
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for chance, path in every[: budget - 1]:
            nodes[tuple(path)] = tree.add(nodes[tuple(path[:-1])], path[-1])
            chances.append(chance)
        return tree, chances

    @property
    def root(self) -> int:
        return self.known.text[-1]

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        self.known.learn(self.tree, answers, list(path))
