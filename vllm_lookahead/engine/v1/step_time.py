# SPDX-License-Identifier: Apache-2.0
"""How long a step takes, by the tokens it is fed: measured before serving and while."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

# Tokens fed in the steps that are timed. A product of a few rows costs little more than
# one of a single row, and of one row more it may cost much more: hence both 8 and 9.
SIZES = (1, 2, 4, 8, 9, 16, 32, 64, 128)
# What a server may spend on it before it starts.
_MAX_SECONDS = 5.0
_TURNS = 3
# Without a measurement: the time of one more token, as a part of that of the first.
_PER_TOKEN = 0.03
# Steps after which an observation counts half as much as a new one; an update takes
# 0.1 ms amid a model's step.
_UPDATE_EVERY = 16
_DECAY = 0.5 ** (_UPDATE_EVERY / 500)
# What is left of all observations after an update without a draft: such steps teach
# nothing of drafts, and those must be tried again, for the load may change.
_FORGET = 0.9
# Steps that the table weighs as much as.
_PRIOR_STEPS = 20.0
# Least slope, as a part of the table's: no token is free.
_LEAST_SLOPE = 0.05


def time_steps(
    run: Callable[[int], object],
    largest: int,
    agree: Callable[[float], float] = float,
) -> list[tuple[int, float]]:
    """Seconds of a step by the tokens fed, the best of a few turns of each.

    Args:
        run: feeds the model so many tokens, none of which has a context.
        largest: most tokens of a step.
        agree: of all ranks' seconds, those that each of them takes for its own.

    Returns:
        (tokens, seconds), of fewer sizes where the model is slow, but of two at least
        if a step may have as many.
    """
    timed: list[tuple[int, float]] = []
    spent = 0.0
    for size in SIZES:
        if size > largest or (len(timed) > 1 and spent > _MAX_SECONDS):
            break
        turns = []
        for _ in range(_TURNS):
            start = time.perf_counter()
            run(size)
            turns.append(agree(time.perf_counter() - start))
        timed.append((size, min(turns)))
        spent += sum(turns)
    return timed


def table_of(timed: Sequence[tuple[int, float]], largest: int) -> np.ndarray:
    """[1 + largest] seconds by tokens: rising, between and beyond what was timed.

    Args:
        timed: as `time_steps` gives them; where there are none, a guess in units of
            the first token's time.
        largest: most tokens of a step.
    """
    tokens = np.arange(1.0 + largest)
    if len(timed) < 2:
        return 1 + _PER_TOKEN * (tokens - 1)
    sizes, seconds = np.array(timed).T
    seconds = np.maximum.accumulate(seconds)
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    beyond = np.maximum(0, tokens - sizes[-1]) * slope
    return np.interp(tokens, sizes, seconds) + beyond


class StepTime:
    """Learns what the table leaves out.

    With s the table's seconds of the tokens fed and E the tokens emitted, a step takes
    its mean of late, plus a (s - mean s), plus d (E - mean E): a and d by regression,
    of which the prior is a = 1 and d = 0.

    Attributes:
        table: [1 + most tokens] float64.
        learned: [5] float64, as ranks broadcast it: a, d and the means of s, E and
            seconds.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.learned = torch.tensor([1.0, 0.0, table[1], 1.0, table[1]]).double()
        self._steps: list[tuple[float, ...]] = []
        # Decaying sums of the products of (1, s, E, seconds).
        self._moments = np.zeros((4, 4))

    def observe(
        self, seconds: float, num_tokens: int, num_emitted: int, num_drafts: int
    ) -> float:
        """Account for a finished step that only decoded.

        Returns:
            How much of what was observed before counts from now on: less than 1 where
            it learned, which it does every few steps.
        """
        s = self.table[min(num_tokens, len(self.table) - 1)]
        self._steps.append((1.0, s, num_emitted, seconds, num_drafts))
        if len(self._steps) < _UPDATE_EVERY:
            return 1.0
        steps = np.array(self._steps)
        self._steps.clear()
        decay = _DECAY * (1.0 if steps[:, 4].any() else _FORGET)
        steps = steps[steps[:, 3] < 2 * np.median(steps[:, 3]), :4]  # no pauses
        self._moments = decay * self._moments + steps.T @ steps
        mean = steps.mean(0)[1:]
        self.learned.numpy()[:] = *self._slopes(*mean), *mean
        return decay

    def _slopes(self, s: float, emitted: float, seconds: float) -> np.ndarray:
        """a and d; they are not less than nothing."""
        products = self._moments - (
            np.outer(self._moments[0], self._moments[0]) / self._moments[0, 0]
        )
        # The prior has seen steps that differ by a tenth of s, and by one token.
        weight = _PRIOR_STEPS * np.array([0.1 * s, 1.0]) ** 2
        prior = np.array([min(1.0, seconds / s), 0.0])
        varied = products[1:3, 1:3] + np.diag(weight)
        slopes = np.linalg.solve(varied, products[1:3, 3] + weight * prior)
        return np.maximum(slopes, [_LEAST_SLOPE * prior[0], 0.0])

    def predict(self, num_tokens: int, num_more: int) -> tuple[np.ndarray, float]:
        """Of a step to come.

        Returns:
            [1 + num_more] seconds with `num_tokens` and up to so many more, without
            those of emitted tokens; and seconds of each emitted token.
        """
        a, d, s, emitted, seconds = self.learned.tolist()
        table = a * self.table[num_tokens : num_tokens + num_more + 1]
        rest = seconds - a * s - d * emitted
        return table + max(rest, 0.1 * seconds - table[0]), d
