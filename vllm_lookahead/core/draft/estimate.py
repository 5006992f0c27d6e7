# SPDX-License-Identifier: Apache-2.0
"""How likely a token is to be accepted after a path below the root.

Each source speaks for some tokens:

- the text: what followed the last three, two or one tokens in the pages, the newest
  (prompt lookup, Saxena 2023; the n-grams of the window are among them);
- the model's answers: its likeliest tokens where it last read the same tokens, be they
  accepted or not (cf. Luo et al. 2024, "Turning Trash into Treasure");
- the model's bigrams (Stewart et al. 2024, "The N-Grammys");
- the sampler's noise: of likely tokens it picks the one that it adds the most to
  (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative
  Decoding"). What is sampled stays what it was; it is guessed better.

What each says is weighed to a score, the logarithm of odds, and the odds of all add up.
Where two sources say the same they mostly say it for the same reason: to add up their
scores would count it twice. A token's odds over those of all, in which all other tokens
count as one, are its chance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_lookahead.core.draft.index import Index, context_at
from vllm_lookahead.core.pages import EMPTY

# Weight of each source: what is added to a token's score where the last 1, 2 or 3
# tokens agree, per nat above FLOOR for answers and bigrams, per unit of noise at
# temperature 1; and the score of "any other token". Fitted by
# `benchmarks/simulate/fit.py`, SmolLM2-135M-Instruct, on prompts of no reported figure.
WEIGHTS = {
    "text1": 5.21,
    "text2": 7.20,
    "text3": 8.67,
    "answer1": 0.91,
    "answer2": 1.02,
    "answer3": 1.15,
    "bigram": 0.83,
    "noise": 0.55,
    "other": 6.45,
    "other by temperature": 0.74,
}
# Log-probabilities at or below this add nothing.
FLOOR = -8.0


@dataclass
class Hints:
    """What the drafter is told besides the pages.

    Attributes:
        bigrams: [V, R] int32 successors of each token, the likeliest first, EMPTY
            where they are not known; V may be 0.
        bigram_logprobs: [V, R] float32 of them.
        temperature: [B] float32, 0 where there is no noise or none is known.
        seeds: [B, N-1] int64, what the noise of the token at each depth is keyed by.
            Triton takes [B, 1] as well, where all depths have the same.
        noise: (seed, position of the node, token after it) to what the sampler adds.
        least: the least chance of being accepted for which a node is drafted.
        before: [B] int32, tokens of others that stand before each request's text
            (`core.corpus`), of which the noise knows nothing; None where none do.
    """

    bigrams: torch.Tensor
    bigram_logprobs: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    noise: Callable[[int, int, int], float]
    least: float = 0.0
    before: torch.Tensor | None = None


@dataclass
class Estimator:
    """Scores what may follow the paths of one request.

    Attributes:
        tokens: its last ones, the root among them; at most CONTEXT.
        position: p, of the root in the request's own text.
        text, answers: its tables.
        hints, b: what else is known, and the request's row of it.
        weights: as WEIGHTS.
    """

    tokens: list[int]
    position: int
    text: Index
    answers: Index
    hints: Hints
    b: int
    weights: Mapping[str, float]

    def evidence(self, path: Sequence[int]) -> list[tuple[str, dict[int, float]]]:
        """What each source says of the token after a path: a figure per token."""
        tokens = [*self.tokens, *path]
        context = context_at(tokens, len(tokens) - 1)
        said: list[tuple[str, dict[int, float]]] = []
        if found := self.text.find(context):
            said.append((f"text{found.agreement}", found.successors))
        if found := self.answers.find(context):
            said.append((f"answer{found.agreement}", _above_floor(found.successors)))
        if 0 <= context[0] < len(self.hints.bigrams):
            ids = self.hints.bigrams[context[0]].tolist()
            logprobs = self.hints.bigram_logprobs[context[0]].tolist()
            said.append(("bigram", _above_floor(dict(zip(ids, logprobs, strict=True)))))
        return said

    def __call__(self, path: Sequence[int]) -> dict[int, float]:
        """Log-probability of each token that may follow a path."""
        odds: dict[int, float] = {}
        for name, row in self.evidence(path):
            for token, x in row.items():
                odds[token] = odds.get(token, 0.0) + math.exp(self.weights[name] * x)
        scores = {token: math.log(x) for token, x in odds.items()}
        temperature = float(self.hints.temperature[self.b])
        if temperature > 0:
            seed = int(self.hints.seeds[self.b, len(path)])
            for token in scores:
                noise = float(self.hints.noise(seed, self.position + len(path), token))
                scores[token] += self.weights["noise"] * temperature * noise
        by_temperature = self.weights["other by temperature"] * temperature
        other = self.weights["other"] + by_temperature
        top = max(other, *scores.values()) if scores else other
        total = math.exp(other - top) + sum(math.exp(x - top) for x in scores.values())
        return {token: x - top - math.log(total) for token, x in scores.items()}


def _above_floor(logprobs: dict[int, float]) -> dict[int, float]:
    return {t: max(x - FLOOR, 0.0) for t, x in logprobs.items() if t != EMPTY}
