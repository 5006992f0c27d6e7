# SPDX-License-Identifier: Apache-2.0
"""Grow the draft tree best first: the likeliest tokens, wherever they branch.

All that is known before the forward pass is added up to an estimate of the model's
logits after a node:

- the pool: what followed the node's token in the pages, and how far the tokens before
  it agree;
- the model's bigrams, `core.draft.bigrams`;
- the last step's answer at the same place. Of a rejected node the token was wrong, but
  not the place: its logits, less the bigrams of its token, tell what the context asks
  for. This is Jacobi iteration on logits rather than tokens (cf. Luo et al. 2024,
  "Turning Trash into Treasure", which keeps the tokens of rejected nodes);
- the sampler's noise: of likely tokens it picks the one that it adds the most to
  (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant
  Speculative Decoding"). What is sampled stays what it was; it is guessed better.

The softmax of that estimate, in which all other tokens count as one, is a node's chance
to be accepted if its parent is. The tree takes nodes from the likeliest on (Li et al.
2024, "EAGLE-2", section 4.1), as long as one is worth the time it takes.
"""

import math
from dataclasses import dataclass

import torch

from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.draft.noise import gumbel_noise
from vllm_lookahead.core.draft.window import add_window, read_window
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node
from vllm_lookahead.params import LookaheadParams

# Weights of the terms of the estimate. `benchmarks/fit_estimate.py` on two models and
# prompts that no figure of the README is of, at temperatures 0, 0.8 and 1.2: 0.51,
# 0.44, 0.63, 1.28, 1.18, 0.16, 0.66, 1.89.
WEIGHTS = {
    "bigram": 0.6,  # per logit of a successor
    "unlisted": 0.8,  # of a seen token that is none, above the last successor listed
    "agreement": 0.7,  # per token, at most MAX_AGREEMENT, before a seen one that agrees
    "latest": 1.2,  # of what followed the latest entry that agrees furthest
    "count": 1.1,  # per log(1 + 2 * times seen)
    "rejected": 0.22,  # per logit of a rejected node's answer, less what is usual
    "noise": 0.6,  # per temperature
    "other": 1.5,  # per temperature: one stand-in for every token that is not listed
}
MAX_AGREEMENT = 4
# Distinct tokens kept of those seen after a token, the newest first.
MAX_SEEN = 16


@dataclass
class Rejected:
    """Nodes of the last step's trees beyond what was accepted, and the answers there.

    Attributes:
        tokens: [B, S] int32, the likeliest first at each depth; EMPTY for none.
        depths: [B, S] int32, distance from the new root.
        rows: [B, S] int64, row of `logits`.
        logits: [n, V] float32 or bfloat16.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    rows: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(
        cls,
        tree: DraftTree,
        num_emitted: torch.Tensor,
        row_of_node: torch.Tensor,
        logits: torch.Tensor,
    ) -> "Rejected":
        """
        Args:
            tree: B trees of T nodes, as fed.
            num_emitted: [B] int32, tokens that came out of each.
            row_of_node: [B, T] int64, row of `logits` for each candidate.
            logits: [n, V]; the rows of rejected nodes are copied.
        """
        depths = tree.depths - num_emitted[:, None]
        nodes = (tree.kinds == CANDIDATE) & (depths >= 0)
        answers = logits[row_of_node[nodes]]
        rows = torch.zeros_like(row_of_node)
        rows[nodes] = torch.arange(len(answers))
        return cls(tree.tokens.where(nodes, EMPTY), depths, rows, answers)

    @classmethod
    def none(cls, num_requests: int) -> "Rejected":
        nothing = torch.zeros(num_requests, 0, dtype=torch.int32)
        return cls(nothing, nothing, nothing.long(), torch.zeros(0, 0))


@dataclass
class Hints:
    """What is known of the next tokens besides the pages.

    Attributes:
        bigrams: [V, R] int32 successors of each token, the likeliest first, EMPTY
            where they are not known; V may be 0.
        bigram_logits: [V, R] float32, their log-probabilities among each other.
        temperature: [B] float32, 0 where there is no noise or none is known.
        seeds: [B, N-1] int64, what the noise of the token at each depth is keyed by.
        rejected: of the last step; S may be 0.
    """

    bigrams: torch.Tensor
    bigram_logits: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    rejected: Rejected


class Drafter:
    """Guesses what may follow a path below the root of request b.

    Attributes:
        history: tokens up to the root.
        grams: of its pages' rings, the newest first, each (token before the key, key,
            values).
    """

    def __init__(
        self, pages: BlockPages, request: Request, hints: Hints, b: int
    ) -> None:
        self.history = [*pages.history(request), request.root]
        self.grams: list[list[int]] = []
        num_blocks = -(-request.position // pages.block_size)
        for block in reversed(request.blocks[:num_blocks]):
            self.grams += pages.ngrams(block)[::-1]
        self.hints, self.b = hints, b

    def seen_after(self, path: list[int]) -> tuple[list[tuple[int, int, int]], int]:
        """(token, furthest agreement, count) of what followed the last token.

        In the order met, from the newest on; a new token takes the place of the last
        one that agrees least, once there are MAX_SEEN, if it agrees further. And the
        token of the latest entry that agrees furthest.
        """
        context = [*self.history, *path]
        sequences = [(self.history, range(len(self.history) - 2, -1, -1))]
        sequences += [(gram, range(1, len(gram) - 1)) for gram in self.grams]
        seen: list[tuple[int, int, int]] = []
        latest, most_agreed = EMPTY, -1
        for sequence, places in sequences:
            for at in places:
                following = sequence[at + 1]
                if sequence[at] != context[-1] or following == EMPTY:
                    continue
                agreed = 0
                while (
                    agreed < min(MAX_AGREEMENT, at, len(context) - 1)
                    and sequence[at - 1 - agreed] == context[-2 - agreed] != EMPTY
                ):
                    agreed += 1
                if agreed > most_agreed:
                    latest, most_agreed = following, agreed
                for i, (token, furthest, count) in enumerate(seen):
                    if token == following:
                        seen[i] = token, max(agreed, furthest), count + 1
                        break
                else:
                    if len(seen) < MAX_SEEN:
                        seen.append((following, agreed, 1))
                        continue
                    least = min(furthest for _, furthest, _ in seen)
                    if agreed > least:
                        i = max(i for i, s in enumerate(seen) if s[1] == least)
                        seen[i] = following, agreed, 1
        return seen, latest

    def successors(self, token: int) -> dict[int, float]:
        """Of a token, the likeliest first, and their logits."""
        if not 0 <= token < len(self.hints.bigrams):
            return {}
        ids = self.hints.bigrams[token].tolist()
        logits = self.hints.bigram_logits[token].tolist()
        return {t: x for t, x in zip(ids, logits, strict=True) if t != EMPTY}

    def answer(self, depth: int, token: int) -> tuple[int, torch.Tensor] | None:
        """Token and logits of a rejected node at this depth, of this token at best."""
        rejected = self.hints.rejected
        at = (rejected.depths[self.b] == depth) & (rejected.tokens[self.b] != EMPTY)
        nodes = at.nonzero()[:, 0].tolist()
        if not nodes:
            return None
        same = [i for i in nodes if int(rejected.tokens[self.b, i]) == token]
        node = (same or nodes)[0]
        row = rejected.logits[int(rejected.rows[self.b, node])]
        return int(rejected.tokens[self.b, node]), row.double()

    def terms(self, path: list[int]) -> dict[int, list[float]]:
        """What WEIGHTS weighs, "other" apart, for each token that may follow."""
        last, depth = (path or self.history)[-1], len(path)
        listed, (seen, latest) = self.successors(last), self.seen_after(path)
        least = min(listed.values(), default=0.0)
        terms = {
            token: [x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] for token, x in listed.items()
        }
        for token, agreed, count in seen:
            bigram = listed.get(token, least)
            unlisted = float(token not in listed and len(listed) > 0)
            is_latest, log_count = float(token == latest), math.log(1 + 2 * count)
            terms[token] = [bigram, unlisted, agreed, is_latest, log_count, 0.0, 0.0]
        answer = self.answer(depth, last)
        if answer is not None:
            wrong, row = answer
            usual = self.successors(wrong)
            least = min(usual.values(), default=0.0)
            for token in terms:
                if token < len(row):
                    terms[token][5] = float(row[token]) - usual.get(token, least)
            top = max((x[5] for x in terms.values()), default=0.0)
            for x in terms.values():
                x[5] -= top
        temperature = float(self.hints.temperature[self.b])
        if temperature > 0:
            seed = self.hints.seeds[self.b, depth]
            for token in terms:
                noise = float(gumbel_noise(seed, torch.tensor(token)))
                terms[token][6] = temperature * noise
        return terms

    def estimate(self, path: list[int]) -> dict[int, float]:
        """Log-probability of each token that may follow the path."""
        *weights, other = WEIGHTS.values()
        logits = {
            token: sum(w * x for w, x in zip(weights, terms, strict=True))
            for token, terms in self.terms(path).items()
        }
        top = max(logits.values(), default=0.0)
        other *= float(self.hints.temperature[self.b])
        total = math.exp(other - top) + sum(math.exp(x - top) for x in logits.values())
        return {token: x - top - math.log(total) for token, x in logits.items()}


def grow(
    pages: BlockPages, batch: RequestBatch, hints: Hints, least: float
) -> tuple[DraftTree, torch.Tensor]:
    """Draft trees of the nodes that are likely enough to be accepted, and the window.

    Args:
        pages: the pool; N bounds the depth.
        batch: B requests. G bounds the leaves, and G * (N - 1) the candidates.
        hints: what else is known.
        least: in (0, 1], chance that a node must have.

    Returns:
        tree: padded to T nodes, candidates in falling order of their chance.
        expected: [B] float64, accepted candidates if the estimate is right.
    """
    k, w = pages.window.shape[1:]
    g = int(batch.verification_set_size.max()) if len(batch.root) else 0
    trees, expected = [], torch.zeros(len(batch.root), dtype=torch.float64)
    for b, request in enumerate(batch.requests()):
        chosen = _grow_one(Drafter(pages, request, hints, b), request, least)
        nodes = [Node(request.root, EMPTY, 0, ROOT)]
        for chance, parent, path in chosen[1:]:
            nodes.append(Node(path[-1], parent, len(path), CANDIDATE))
            expected[b] += math.exp(chance)
        window = read_window(pages, request)
        trees.append(add_window(nodes, window, request.max_nodes))
    return DraftTree.of(trees, LookaheadParams(w, k + 1, g).max_tree_size), expected


def _grow_one(
    drafter: Drafter, request: Request, least: float
) -> list[tuple[float, int, list[int]]]:
    """(log-chance, parent, path) of each node, the root's first."""
    leaves, depth = request.verification_set_size, request.ngram_size - 1
    most = min(request.max_nodes, 1 + leaves * depth)
    nodes: list[tuple[float, int, list[int]]] = [(0.0, EMPTY, [])]
    waiting: list[tuple[float, int, list[int]]] = []
    num_leaves, is_parent = 0, {0}
    while len(nodes) < most:
        chance, _, path = nodes[-1]
        if len(path) < depth:
            for token, x in drafter.estimate(path).items():
                if chance + x >= math.log(least):
                    waiting.append((chance + x, len(nodes) - 1, [*path, token]))
        # The first child of a leaf takes its place; any other child is one leaf more.
        waiting = [
            node for node in waiting if num_leaves < leaves or node[1] not in is_parent
        ]
        if not waiting:
            break
        best = max(waiting, key=lambda node: node[0])
        waiting.remove(best)
        num_leaves += best[1] in is_parent
        is_parent.add(best[1])
        nodes.append(best)
    return nodes
