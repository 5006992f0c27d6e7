# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a candidate are worth drafting.

Where a step is compute-bound, a drafted token costs time whether or not it is
accepted. With t the mean time of a step, E the tokens it emits, and c the time one
more token takes, drafting a token that is accepted with probability v raises E / t
only if v > c * E / t. Both sides are measured while serving: v by how far the
candidate agreed with the request's suffix, its rank, and the depth; c by regression
of step time on tokens fed. So drafts shrink, to nothing if need be, as batches grow.
"""

import numpy as np
import torch

from vllm_lookahead.core.pool import MAX_CONTEXT
from vllm_lookahead.params import LookaheadParams

# Acceptance per token assumed of an entry before any was seen: agreement on the
# key alone, and what each further agreeing token adds.
_PRIOR_BASE, _PRIOR_STEP, _PRIOR_TRIALS = 0.3, 0.06, 4.0
# A token's time over a step's, assumed until both have been measured.
_PRIOR_COST = 0.03
_MIN_COST = 0.002
# Steps after which an observation counts half as much as a new one.
_HALF_LIFE = 500
_UPDATE_EVERY = 8


class DraftLengthPolicy:
    """Learns `chain_length`, the table that `propose` cuts candidates by.

    Attributes:
        trials, hits: [(MAX_CONTEXT + 1) * G, N-1] float64, for `observe`.
        chain_length: [MAX_CONTEXT + 1, G] int32.
    """

    def __init__(self, params: LookaheadParams) -> None:
        g, depth = params.verification_set_size, params.ngram_size - 1
        origins = (MAX_CONTEXT + 1) * g
        self.trials = torch.zeros(origins, depth, dtype=torch.float64)
        self.hits = torch.zeros(origins, depth, dtype=torch.float64)
        self.chain_length = torch.full((MAX_CONTEXT + 1, g), depth, dtype=torch.int32)
        context = np.arange(MAX_CONTEXT + 1).repeat(g)[:, None]
        per_token = _PRIOR_BASE + _PRIOR_STEP * context
        self._prior = per_token ** np.arange(1, depth + 1)
        # Decaying sums of 1, n, n^2, t, nt and of tokens emitted.
        self._sums = np.zeros(6)
        self._steps = 0

    def observe_step(self, seconds: float, num_tokens: int, num_emitted: int) -> None:
        """Account for a finished step that only decoded.

        Args:
            seconds: from its start to the next step's.
            num_tokens: fed, drafts included.
            num_emitted: tokens the step's requests gained.
        """
        count, _, _, time, *_ = self._sums
        if count > _UPDATE_EVERY and seconds > 4 * time / count:
            return  # a pause, not a step
        n, t = float(num_tokens), seconds
        self._sums *= 0.5 ** (1 / _HALF_LIFE)
        self._sums += (1.0, n, n * n, t, n * t, num_emitted)
        self._steps += 1
        if self._steps % _UPDATE_EVERY == 0:
            self._update()

    @property
    def threshold(self) -> float:
        """Least acceptance probability that pays: c * E / t."""
        count, n, nn, t, nt, emitted = self._sums
        variance = nn - n * n / count
        cost = _PRIOR_COST
        if variance > count:  # spread by more than a token
            slope = (nt - n * t / count) / variance
            cost = slope * count / t
        return max(cost, _MIN_COST) * emitted / count

    def _update(self) -> None:
        decay = 0.5 ** (_UPDATE_EVERY / _HALF_LIFE)
        self.trials *= decay
        self.hits *= decay
        accepted = self.hits.numpy() + _PRIOR_TRIALS * self._prior
        rate = accepted / (self.trials.numpy() + _PRIOR_TRIALS)
        pays = np.minimum.accumulate(rate, axis=1) > self.threshold
        length = pays.sum(1, dtype=np.int32).reshape(self.chain_length.shape)
        self.chain_length.copy_(torch.from_numpy(length))
