# SPDX-License-Identifier: Apache-2.0
"""Trees cut on the device to the likeliest nodes of a step.

vLLM's runner has a seam for it, made for the chains of DSpark: what it asks of its
`adaptive_verification` it asks of `TreeTrimmer`. The host knows the number of all nodes
that are fed, and of each tree the most.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.spec_decode import adaptive_verification
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
    AdaptiveVerificationManager,
)

from vllm_lookahead.engine.forest import Curve
from vllm_lookahead.engine.v2.trees import Plan, Rows, StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees

# vLLM 0.33 also asks for counts on the host, which only a sharded sampler needs.
ALSO_RETURNED = (None,) if hasattr(adaptive_verification, "AdmittedDraftCounts") else ()


class TreeTrimmer(AdaptiveVerificationManager):
    """vLLM's manager, for trees whose chances wait with them.

    Attributes:
        budget: nodes to feed beside the roots, in the step that is prepared.
    """

    num_bonus_tokens = 1

    def __init__(self, runner: Any, step: StepTrees, waiting: WaitingTrees) -> None:
        # Not vLLM's, which allocates room for confidences and streams to copy them.
        self.req_states = runner.req_states
        self.query_start_loc = runner.input_buffers.query_start_loc
        self.sizes, self.step, self.waiting = runner.sizes, step, waiting
        self.device = runner.device
        self.budget = 0
        self.times: tuple[Curve, int] | None = None
        self._cudagraph_limit = 0
        self._counts: tuple[np.ndarray, np.ndarray, np.ndarray]

    def add_request(self, req_idx: int) -> None:
        """What waits at an index is its request's by the time that it is fed."""

    def record_confidences(self, *args: Any) -> None:
        """They wait with the trees."""

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        nodes = sum(num_tokens_per_req[name] - 1 for name in draft_tokens)
        return sum(num_tokens_per_req.values()) - nodes + self.budget

    def compact_batch(
        self,
        num_draft_tokens_per_req: np.ndarray,
        num_scheduled_tokens: np.ndarray,
        cu_num_logits_np: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        # Of a tree vLLM knows N-1 drafts.
        scheduled = num_scheduled_tokens
        nodes = np.where(num_draft_tokens_per_req > 0, scheduled - 1, 0)
        self._batch_budget: Any = {}, {}, self.budget
        even, _ = super().compact_batch(nodes, scheduled, cu_num_logits_np)
        self._counts = nodes, scheduled, even
        return even, cu_num_logits_np

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[Any, ...]:
        nodes, scheduled, even = self._counts
        index = self.req_states.req_id_to_index
        indices = np.array([index[name] for name in req_ids])
        rows = Rows(len(req_ids), indices, nodes, scheduled)
        self.step.plan = plan = Plan.make(rows, self.sizes, self.device, even)
        start = self.query_start_loc
        plan.rank(self.waiting.chances, idx_mapping, self.budget, start)
        # The tokens of trees and their rows of logits are put in place later, by
        # `StepTrees.feed` and the mask. vLLM sees a row of each request and no draft.
        return plan.cu_requests, start, 0, *ALSO_RETURNED

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        # Nodes of a tree share their request's context: vLLM's would have one each.
        for batch in super().batches_to_profile(capture_sizes):
            yield batch | {"context_len": 0}

    def set_cost_curves(self, draft_curve: Curve, verify_curve: Curve) -> None:
        """Keep what was measured. A draft costs the same whatever is fed."""
        self.times = verify_curve, self._cudagraph_limit

    def take_times(self) -> tuple[Curve, int] | None:
        """What was measured, and the largest graph; once, for the scheduler."""
        times, self.times = self.times, None
        return times
