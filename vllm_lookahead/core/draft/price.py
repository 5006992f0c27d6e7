# SPDX-License-Identifier: Apache-2.0
"""How likely a node must be to be worth drafting.

Where a step is compute-bound, a drafted token costs time whether or not it is
accepted, and an accepted one must be sampled. With t the time that steps take now, E
the tokens they emit, c the time one more token takes and d that of one more emitted,
drafting a token that is accepted with probability v raises E / t only if
v > c * E / (t - d * E). All are measured while serving: c and d by regression of step
time; and v is the drafter's chance times the share of promised drafts that were kept.
So trees shrink, to nothing if need be, as batches grow.
"""

import numpy as np
import torch

# Drafts promised to be accepted and those that were, before any was seen.
_PRIOR_PROMISED, _PRIOR_KEPT = 20.0, 15.0
# Assumed before any was measured: the time of one more token fed, and of one more
# emitted, as parts of a step's time per request. It weighs as much as so many steps
# whose number of tokens is one off the mean.
_PRIOR_COSTS, _PRIOR_STEPS = np.array([0.03, 0.0]), 20.0
_MIN_COSTS = np.array([0.002, 0.0])
# Where tokens are free: a node that is as unlikely is not worth its bookkeeping.
_LEAST = 0.005
# Steps after which an observation counts half as much as a new one.
_HALF_LIFE = 500
# What is left of all observations after an update without a draft: such steps teach
# nothing, and drafts must be tried again, for the load may change.
_FORGET = 0.9
# An update takes 0.2 ms amid a model's step.
_UPDATE_EVERY = 16


class DraftSizePolicy:
    """Learns the least chance of being accepted for which a node is drafted.

    Attributes:
        least: a float64 of no dimension, as ranks broadcast it.
    """

    def __init__(self) -> None:
        self.least = torch.zeros((), dtype=torch.float64)
        # (1, tokens fed, tokens emitted, seconds, drafts promised, drafts kept) of the
        # steps not accounted for yet. Of all others decaying sums: of the products of
        # the first four, and of the last two.
        self._steps: list[tuple[float, ...]] = []
        self._moments = np.zeros((4, 4))
        self._drafted = np.zeros(2)
        self._costs = _PRIOR_COSTS
        self._set_least(emitted=1.0, seconds=1.0)

    def observe_step(
        self,
        seconds: float,
        num_requests: int,
        num_tokens: int,
        num_emitted: int,
        promised: float,
    ) -> bool:
        """Account for a finished step that only decoded.

        Args:
            seconds: from its start to the next step's.
            num_requests: with a tree.
            num_tokens: fed, drafts included.
            num_emitted: tokens the requests gained.
            promised: drafts that were to be accepted, going by their chances.

        Returns:
            Whether `least` was learned anew.
        """
        kept = num_emitted - num_requests
        step = 1.0, num_tokens, num_emitted, seconds, promised, kept
        self._steps.append(step)
        if len(self._steps) < _UPDATE_EVERY:
            return False
        self._update()
        return True

    def _set_least(self, emitted: float, seconds: float) -> None:
        """From c and d, and E and t of late."""
        cost, per_emitted = self._costs
        pays = cost * emitted / max(seconds - per_emitted * emitted, 0.1 * seconds)
        promised, kept = self._drafted + (_PRIOR_PROMISED, _PRIOR_KEPT)
        self.least.fill_(min(max(pays * promised / kept, _LEAST), 1.0))

    def _learn_costs(self, num_requests: float, seconds: float) -> None:
        """Regress step time on tokens fed and emitted, as far as both have varied.

        Where they have not, costs are those of the prior.
        """
        products = self._moments - (
            np.outer(self._moments[0], self._moments[0]) / self._moments[0, 0]
        )
        varied = products[1:3, 1:3] + _PRIOR_STEPS * np.eye(2)
        unit = seconds / num_requests
        explained = products[1:3, 3] + _PRIOR_STEPS * unit * _PRIOR_COSTS
        self._costs = np.maximum(np.linalg.solve(varied, explained), unit * _MIN_COSTS)

    def _update(self) -> None:
        decay = 0.5 ** (_UPDATE_EVERY / _HALF_LIFE)
        steps = np.array(self._steps)
        self._steps.clear()
        self._drafted = decay * self._drafted + steps[:, 4:].sum(0)
        steps = steps[steps[:, 3] < 2 * np.median(steps[:, 3])]  # others are pauses
        decay *= 1.0 if steps[:, 4].any() else _FORGET
        self._moments = decay * self._moments + steps[:, :4].T @ steps[:, :4]
        _, _, emitted, seconds, _, kept = steps.mean(0)
        self._learn_costs(emitted - kept, seconds)
        self._set_least(emitted, seconds)
