# SPDX-License-Identifier: Apache-2.0
"""Propose: at the end of a step, build the trees of the next."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner


class LookaheadSpeculator(BaseSpeculator):
    """Drafts without a draft model: pool and window are in the block pages."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, runner: "LookaheadModelRunner") -> None:
        self.runner = runner
        num_drafts = runner.lookahead.ngram_size - 1
        self.drafts = torch.zeros(
            runner.max_num_reqs, num_drafts, dtype=torch.int64, device=runner.device
        )

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No graph of its own: a few launches, all of them device-driven."""

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(
        self,
        input_batch: "InputBatch",
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Put the batch's next trees into their slots.

        Returns:
            [B, N-1] int64, the first candidate of each request.
        """
        runner, plan = self.runner, self.runner.step.plan
        drafts = self.drafts[: input_batch.num_reqs]
        if dummy_run or not plan.drafts:
            return drafts.zero_()
        states, idx_mapping = runner.req_states, input_batch.idx_mapping
        batch = plan.batch(
            runner.block_tables.input_block_tables[0],
            states.num_computed_tokens.gpu[idx_mapping],
            states.last_sampled_tokens[idx_mapping, 0].int(),
        )
        tree = runner.ops.propose(
            runner.pages,
            batch,
            runner.lookahead.verification_set_size,
            runner.bigrams,
        )
        runner.slots.store(tree, idx_mapping, drafts)
        return drafts
