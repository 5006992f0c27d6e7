# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a candidate are worth drafting.

Where a step is compute-bound, a drafted token costs time whether or not it is
accepted, and an accepted one must be sampled. With t the mean time of a step, E the
tokens it emits, c the time one more token takes and d that of one more emitted,
drafting a token that is accepted with probability v raises E / t only if
v / (c + v * d) > E / t. All are measured while serving: v by how far the candidate
agreed with the request's suffix, its rank, and the depth; c and d by regression of
step time. So drafts shrink, to nothing if need be, as batches grow.
"""

import numpy as np
import torch

from vllm_lookahead.core.pool import BIGRAM, NUM_ORIGINS
from vllm_lookahead.params import LookaheadParams

# Acceptance per token assumed before any was seen: of a pool entry that agrees on
# the key alone, and what each further agreeing token adds; a bigram is one short.
_PRIOR_BASE, _PRIOR_STEP, _PRIOR_TRIALS = 0.3, 0.06, 4.0
# Time of a token fed and of one emitted, over a step's, and how many steps that are
# one token off the mean count as much as this assumption.
_PRIOR_COSTS, _PRIOR_STEPS = np.array([0.03, 0.0]), 20.0
_MIN_COSTS = np.array([0.002, 0.0])
# Steps after which an observation counts half as much as a new one.
_HALF_LIFE = 500
# An update takes 0.3 ms amid a model's step.
_UPDATE_EVERY = 16


class DraftLengthPolicy:
    """Learns `chain_length`, the table that `propose` cuts candidates by.

    Attributes:
        trials, hits: [NUM_ORIGINS * G, N-1] float64, for `observe`.
        chain_length: [NUM_ORIGINS, G] int32.
    """

    def __init__(self, params: LookaheadParams) -> None:
        g, depth = params.verification_set_size, params.ngram_size - 1
        self.trials = torch.zeros(NUM_ORIGINS * g, depth, dtype=torch.float64)
        self.hits = torch.zeros_like(self.trials)
        self.chain_length = torch.full((NUM_ORIGINS, g), depth, dtype=torch.int32)
        context = np.arange(NUM_ORIGINS)
        context[BIGRAM] = -1
        self._prior = _PRIOR_BASE + _PRIOR_STEP * context.repeat(g)
        # (1, tokens fed, tokens emitted, seconds) of steps not accounted for yet, and
        # the decaying sum of its products with itself over all others.
        self._steps: list[tuple[float, ...]] = []
        self._moments = np.zeros((4, 4))
        self._costs = _PRIOR_COSTS

    def observe_step(self, seconds: float, num_tokens: int, num_emitted: int) -> bool:
        """Account for a finished step that only decoded.

        Args:
            seconds: from its start to the next step's.
            num_tokens: fed, drafts included.
            num_emitted: tokens the step's requests gained.

        Returns:
            Whether `chain_length` was learned anew.
        """
        self._steps.append((1.0, num_tokens, num_emitted, seconds))
        if len(self._steps) < _UPDATE_EVERY:
            return False
        self._update()
        return True

    @property
    def threshold(self) -> float:
        """Least acceptance probability that pays: c * E / (t - d * E)."""
        emitted = self._moments[0, 2] / self._moments[0, 0]
        cost, per_emitted = self._costs
        return float(cost * emitted / max(1 - per_emitted * emitted, 0.1))

    def _learn_costs(self) -> None:
        """Regress step time on tokens fed and emitted, as far as both have varied.

        Where they have not, costs go back to the prior: drafts that never paid are
        tried again now and then, for the load may have changed.
        """
        count, *_, seconds = self._moments[0]
        products = self._moments - np.outer(self._moments[0], self._moments[0]) / count
        varied = products[1:3, 1:3] + _PRIOR_STEPS * np.eye(2)
        explained = products[1:3, 3] * count / seconds + _PRIOR_STEPS * _PRIOR_COSTS
        self._costs = np.maximum(np.linalg.solve(varied, explained), _MIN_COSTS)

    def _update(self) -> None:
        decay = 0.5 ** (_UPDATE_EVERY / _HALF_LIFE)
        self._moments *= decay
        steps = np.array(self._steps)
        seconds = steps[:, -1]
        steps = steps[seconds < 2 * np.median(seconds)]  # others are pauses
        self._moments += steps.T @ steps
        self._steps.clear()
        self._learn_costs()
        self.trials *= decay
        self.hits *= decay
        trials = self.trials.numpy() + _PRIOR_TRIALS
        rate, before = self.hits.numpy() / trials, 1.0
        for depth in range(rate.shape[1]):  # an unseen one is guessed from the last
            guess = before * self._prior
            rate[:, depth] += guess * _PRIOR_TRIALS / trials[:, depth]
            before = rate[:, depth]
        # What was tried little may be better than it looked: one standard deviation.
        rate += np.sqrt(rate * (1 - rate) / trials)
        pays = np.minimum.accumulate(rate, axis=1) > self.threshold
        length = pays.sum(1, dtype=np.int32).reshape(self.chain_length.shape)
        self.chain_length.copy_(torch.from_numpy(length))
