# SPDX-License-Identifier: Apache-2.0
"""The package's drafter, in plain Python, with one source more.

"own" is that drafter. "own~context4" tells contexts apart by four tokens. "own~tail"
drafts the tokens that were sampled at the last step's rejected nodes. "own~window"
feeds a window of `WINDOW`, "own~window~columns" drafts its newest guesses as well.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.simulate.ours import BLOCK_SIZE, Ours
from benchmarks.simulate.protocol import Answers, Request, Tree
from vllm_lookahead.core.answers import MAX_REJECTED
from vllm_lookahead.core.draft.estimate import FLOOR, WEIGHTS, Estimator
from vllm_lookahead.core.draft.grow import grow
from vllm_lookahead.core.draft.index import Found
from vllm_lookahead.core.draft.window import add_window, read_window
from vllm_lookahead.core.pages import EMPTY, NUM_ANSWERS
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node

# Weights that fitting starts from, of the sources that the package does not have.
START = dict(WEIGHTS) | {
    "text4": 5.0,
    "answer4": 0.45,
    "tail": 1.0,
    "tail, same": 2.0,
    "column": 1.0,
}
# W and N.
WINDOW = 2, 6
# A source, the token it must follow if any, and what it says.
Said = tuple[str, int | None, dict[int, float]]


class Exact:
    """As `core.draft.index.Index`, without cells that two contexts share."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.places: dict[tuple[int, ...], dict[int, float]] = {}

    def file(self, context: Sequence[int], successors: dict[int, float]) -> None:
        for length in range(1, min(len(context), self.longest) + 1):
            self.places[tuple(context[:length])] = successors

    def file_text(self, tokens: Sequence[int], first: int = 0) -> None:
        """What followed each place of a text from `first` on."""
        for at in range(first, len(tokens) - 1):
            near = tokens[max(0, at + 1 - self.longest) : at + 1][::-1]
            self.file(near, {tokens[at + 1]: 1.0})

    def find(self, context: Sequence[int]) -> Found | None:
        for length in range(min(len(context), self.longest), 0, -1):
            successors = self.places.get(tuple(context[:length]))
            if successors is not None:
                return Found(length, successors)
        return None


@dataclass
class Wider(Estimator):
    """With evidence that is of a place ahead, whatever leads to it.

    Attributes:
        longest: tokens of a context.
        ahead: of each depth below the root what else is said.
    """

    longest: int
    ahead: Mapping[int, Sequence[Said]]

    def evidence(self, path: Sequence[int]) -> list[tuple[str, dict[int, float]]]:
        tokens = [*self.tokens, *path]
        context = tokens[: -self.longest - 1 : -1]
        said: list[tuple[str, dict[int, float]]] = []
        if found := self.text.find(context):
            said.append((f"text{found.agreement}", found.successors))
        if found := self.answers.find(context):
            said.append((f"answer{found.agreement}", above_floor(found.successors)))
        ids = self.hints.bigrams[context[0]].tolist()
        logprobs = self.hints.bigram_logprobs[context[0]].tolist()
        said.append(("bigram", above_floor(dict(zip(ids, logprobs, strict=True)))))
        for name, after, row in self.ahead.get(len(path), []):
            if after is None or after == context[0]:
                said.append((name, row))
        return said


def above_floor(row: dict[int, float]) -> dict[int, float]:
    return {t: max(x - FLOOR, 0.0) for t, x in row.items() if t != EMPTY}


class Experiment(Ours):
    """See the file.

    Attributes:
        text: what followed what.
        rings: of each block of its text, the answers kept there.
        ahead: what was sampled at the last step's rejected nodes, by depth.
    """

    def __init__(
        self,
        request: Request,
        sizes: tuple[int, int, int],
        weights: Mapping[str, float] = START,
        longest: int = 3,
        tail: bool = False,
        columns: bool = False,
    ) -> None:
        """
        Args:
            longest: tokens of a context.
            tail, columns: whether they are drafted.
        """
        super().__init__(request, sizes, weights)
        self.tail, self.columns, self.longest = tail, columns, longest
        self.ahead: dict[int, list[Said]] = {}
        self.output = [*request.prompt, request.first]
        self.rings: dict[int, deque[tuple[list[int], dict[int, float]]]] = {}
        self.text = Exact(longest)
        self.text.file_text(self.output)

    def noise(self, seed: int, position: int, token: int) -> float:
        """`cpu_noise`, of all tokens at once."""
        number = position + 1 - len(self.request.prompt)
        return float(self.request.noise[number][token])

    def evidence(self, path: Sequence[int]) -> Iterable[tuple[str, dict[int, float]]]:
        return self.estimator.evidence(path)

    def draft(self, budget: int) -> Tree:
        one = self.one
        self.batch = one.batch(budget)
        (request,) = self.batch.requests()
        ahead = {depth: [*said] for depth, said in self.ahead.items()}
        window = read_window(one.pages, request)
        if self.columns:
            for depth, row in enumerate(window[1:]):
                ahead.setdefault(depth, []).append(("column", None, {row[0]: 1.0}))
        answers, hints = Exact(self.longest), self.hints
        hints.noise = self.noise
        for ring in self.rings.values():
            for context, said in ring:
                answers.file(context, said)
        self.estimator = Wider(
            self.output[-self.longest :],
            request.position,
            self.text,  # type: ignore[arg-type]
            answers,  # type: ignore[arg-type]
            hints,
            0,
            self.weights,
            self.longest,
            ahead,
        )
        most = budget - 1 - max(0, sum(map(len, window)) - 1)
        nodes = [Node(request.root, EMPTY, 0, ROOT)]
        node_of: dict[tuple[int, ...], int] = {(): 0}
        self.chances = [0.0]
        for branch in grow(self.estimator, request, 0.0)[: max(0, most)]:
            path = branch.path
            node_of[path] = len(nodes)
            nodes.append(Node(path[-1], node_of[path[:-1]], len(path), CANDIDATE))
            self.chances.append(branch.log_chance)
        count = len(nodes)
        nodes = add_window(nodes, window, budget)
        self.tree = DraftTree.of([nodes], len(nodes))
        return Tree([x.token for x in nodes], [x.parent for x in nodes], count)

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        nodes, start = self.tree.nodes()[0], len(self.output)
        accepted = set(path)
        count = len(self.chances)
        branches = Tree(
            [node.token for node in nodes[:count]], [n.parent for n in nodes[:count]]
        ).paths()
        rejected = [i for i in range(1, count) if i not in accepted][:MAX_REJECTED]
        block = (self.one.position + len(path) - 1) // BLOCK_SIZE
        ring = self.rings.setdefault(
            block, deque(maxlen=self.one.pages.answers.shape[1])
        )
        for i in [*rejected[::-1], *path]:
            context = [*self.output[-self.longest :], *branches[i]]
            ids, logprobs = answers.ids[i], answers.logprobs[i]
            said = zip(
                ids[:NUM_ANSWERS].tolist(), logprobs[:NUM_ANSWERS].tolist(), strict=True
            )
            ring.append((context[: -self.longest - 1 : -1], dict(said)))
        self.ahead = {}
        for i in rejected if self.tail else []:
            depth = len(branches[i]) - len(path)
            if depth >= 0:
                said_there = self.ahead.setdefault(depth, [])
                token, sampled = nodes[i].token, answers.sampled[i]
                if not said_there:
                    said_there.append(("tail", None, {sampled: 1.0}))
                said_there.append(("tail, same", token, {sampled: 1.0}))
        super().accept(answers, path)
        self.output += [answers.sampled[node] for node in path]
        self.text.file_text(self.output, start - 1)
