# SPDX-License-Identifier: Apache-2.0
"""The paper's lookahead, its defects removed, prompt n-grams in its pool."""

from collections.abc import Sequence

from paper_lookahead import PaperLookahead  # type: ignore[import-not-found]

from benchmarks.simulate.protocol import Answers, Request, Tree


class Paper:
    """`paper_lookahead.py` behind the protocol; it warms up with the prefill."""

    reads_all_nodes = True

    def __init__(self, request: Request, sizes: tuple[int, int, int]) -> None:
        self.method = PaperLookahead(request.prompt, *sizes, True, request.seed)
        tree = self._tree()
        answers = request.ask(len(request.prompt) - 1, tree)
        self.method.accept(answers.sampled)

    def _tree(self) -> Tree:
        draft = self.method.propose()
        parents = [-1]
        for node in range(1, len(draft.tokens)):
            above = [d == draft.depths[node] - 1 for d in draft.depths[:node]]
            parents.append(
                next(i for i, ok in enumerate(above) if ok and draft.sees[node, i])
            )
        verified = 1 + sum(len(chain) for chain in self.method.chains)
        return Tree(draft.tokens, parents, verified)

    def draft(self, budget: int) -> Tree:
        return self._tree()

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        emitted, accepted = self.method.accept(answers.sampled)
        assert len(accepted) == len(path)
