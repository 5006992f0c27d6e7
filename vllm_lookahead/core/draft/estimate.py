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

What they say is weighed and added up to a score. The softmax of the scores, in which
all other tokens count as one, is a token's chance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_lookahead.core.draft.index import Index, context_at
from vllm_lookahead.core.pages import EMPTY


class Weights(NamedTuple):
    """What the sources' words weigh.

    Attributes:
        text: of the token that followed, by how many tokens agree, 1 to 3.
        answer: per nat above FLOOR, by how many tokens agree.
        bigram: per nat above FLOOR.
        noise: per unit of noise, at temperature 1.
        other: score of all tokens that nothing speaks for, and more of it per
            temperature.
    """

    text: tuple[float, float, float]
    answer: tuple[float, float, float]
    bigram: float
    noise: float
    other: tuple[float, float]


# `benchmarks/simulate/fit.py`, SmolLM2-135M-Instruct, prompts that no figure is of.
WEIGHTS = Weights(
    text=(1.27, 2.90, 4.61),
    answer=(0.42, 0.42, 0.45),
    bigram=0.27,
    noise=0.54,
    other=(3.84, 0.73),
)
# A log-probability that says as little for a token as silence.
FLOOR = -8.0


@dataclass
class Hints:
    """What is known of the next tokens besides the pages.

    Attributes:
        bigrams: [V, R] int32 successors of each token, the likeliest first, EMPTY
            where they are not known; V may be 0.
        bigram_logprobs: [V, R] float32 of them.
        temperature: [B] float32, 0 where there is no noise or none is known.
        seeds: [B, N-1] int64, what the noise of the token at each depth is keyed by.
        noise: (seed, position of the node, token after it) to what the sampler adds.
        least: the least chance of being accepted for which a node is drafted.
    """

    bigrams: torch.Tensor
    bigram_logprobs: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    noise: Callable[[int, int, int], float]
    least: float = 0.0


@dataclass
class Estimator:
    """Of one request.

    Attributes:
        tokens: its last ones, the root among them; at most CONTEXT.
        position: p, of the root.
        text, answers: its tables.
        hints, b: what else is known, and which row of it.
        weights: of the sources.
    """

    tokens: list[int]
    position: int
    text: Index
    answers: Index
    hints: Hints
    b: int
    weights: Weights

    def evidence(self, path: list[int]) -> list[tuple[str, dict[int, float]]]:
        """What each source says of the token after a path: a figure per token."""
        tokens = [*self.tokens, *path]
        context = context_at(tokens, len(tokens) - 1)
        said: list[tuple[str, dict[int, float]]] = []
        if found := self.text.find(context):
            said.append(
                (f"text{found.agreement}", dict.fromkeys(found.successors, 1.0))
            )
        if found := self.answers.find(context):
            said.append((f"answer{found.agreement}", _above_floor(found.successors)))
        if 0 <= context[0] < len(self.hints.bigrams):
            ids = self.hints.bigrams[context[0]].tolist()
            logprobs = self.hints.bigram_logprobs[context[0]].tolist()
            said.append(("bigram", _above_floor(dict(zip(ids, logprobs, strict=True)))))
        return said

    def __call__(self, path: list[int]) -> dict[int, float]:
        """Log-probability of each token that may follow a path."""
        by_name = {"bigram": self.weights.bigram}
        for i in range(3):
            by_name[f"text{i + 1}"] = self.weights.text[i]
            by_name[f"answer{i + 1}"] = self.weights.answer[i]
        scores: dict[int, float] = {}
        for name, row in self.evidence(path):
            for token, x in row.items():
                scores[token] = scores.get(token, 0.0) + by_name[name] * x
        temperature = float(self.hints.temperature[self.b])
        if temperature > 0:
            seed = int(self.hints.seeds[self.b, len(path)])
            for token in scores:
                noise = float(self.hints.noise(seed, self.position + len(path), token))
                scores[token] += self.weights.noise * temperature * noise
        other = self.weights.other[0] + self.weights.other[1] * temperature
        top = max(other, *scores.values()) if scores else other
        total = math.exp(other - top) + sum(math.exp(x - top) for x in scores.values())
        return {token: x - top - math.log(total) for token, x in scores.items()}


def _above_floor(logprobs: dict[int, float]) -> dict[int, float]:
    return {t: max(x - FLOOR, 0.0) for t, x in logprobs.items() if t != EMPTY}
