# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step is fed, by what they gained and cost so far."""

import numpy as np
import torch

from vllm_lookahead.core.draft.forest import NUM_BINS, Worth
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v1.step_time import StepTime, table_of
from vllm_lookahead.numba_kernels.forest import count_kept, cut

# Of each bin's chances, so much was kept of so many promised drafts before any was fed.
_PRIOR_SHARE, _PRIOR_PROMISED = 0.8, 5.0
# A node that is as unlikely is not worth its bookkeeping, whatever it costs.
_LEAST = 0.005


class Forest:
    """Learns what nodes are worth, and feeds the best of a step's.

    Attributes:
        step_time: what they cost.
        least: chance below which drafting a node is a waste, going by the last step.
    """

    def __init__(self, max_num_tokens: int) -> None:
        """
        Args:
            max_num_tokens: of a step.
        """
        self.step_time = StepTime(table_of([], max_num_tokens))
        self.least = _LEAST
        self._promised, self._kept = np.zeros(NUM_BINS), np.zeros(NUM_BINS)

    def cut(
        self, tree: DraftTree, chances: torch.Tensor, num_requests: int, num_other: int
    ) -> None:
        """Cut the trees to the nodes that are worth their time.

        Args:
            tree, chances: as drafted; the tree's columns are cut in place.
            num_requests: of the step, those without a tree among them.
            num_other: tokens of these.
        """
        num_tokens = num_other + int(tree.num_nodes.sum())
        num_candidates = int(np.count_nonzero(chances.numpy()))
        seconds, per_emitted = self.step_time.predict(
            num_tokens - num_candidates, num_candidates
        )
        shares = (self._kept + _PRIOR_SHARE * _PRIOR_PROMISED) / (
            self._promised + _PRIOR_PROMISED
        )
        assert len(seconds) == 1 + num_candidates, "more tokens than a step has"
        worth = Worth(shares, seconds, per_emitted, float(num_requests))
        self.least = max(_LEAST, 0.5 * cut(tree, chances, worth))

    def observe_step(
        self,
        seconds: float,
        num_tokens: int,
        chances: torch.Tensor,
        verdict: Verdict,
    ) -> bool:
        """Account for a finished step of trees alone.

        Args:
            seconds: from its start to the next step's.
            num_tokens: fed.
            chances: of the candidates fed, 0 elsewhere.
            verdict: of the trees.

        Returns:
            Whether `step_time` learned.
        """
        count_kept(chances, verdict, self._promised, self._kept)
        emitted, num_drafts = int(verdict.num_emitted.sum()), num_tokens - len(chances)
        left = self.step_time.observe(seconds, num_tokens, emitted, num_drafts)
        self._promised *= left
        self._kept *= left
        return left < 1
