# SPDX-License-Identifier: Apache-2.0
"""Propose: at the end of a step, build the trees of the next."""

from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.v2.trees import StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.ops import TritonOps


class LookaheadSpeculator(BaseSpeculator):
    """Drafts without a draft model: pool and window are in the block pages.

    Attributes:
        pages: allocated with the K/V cache.
        bigrams: [V, R] int32, see `core.draft.bigrams`; None if nobody asked the model.
        drafts: [max_num_reqs, N-1] int64, what the scheduler is told.
    """

    supports_mm_inputs = False
    draft_logits = None
    pages: BlockPages

    def __init__(
        self,
        runner: GPUModelRunner,
        step: StepTrees,
        waiting: WaitingTrees,
        ops: TritonOps,
        sizes: LookaheadParams,
    ) -> None:
        """
        Args:
            runner: vLLM's, for its requests and block tables.
            step: the trees of the step that ends.
            waiting: where those of the next step go.
            ops: to draft with.
            sizes: the server's.
        """
        self.runner: Any = runner
        self.step, self.waiting, self.ops, self.sizes = step, waiting, ops, sizes
        self.bigrams: torch.Tensor | None = None
        shape = runner.max_num_reqs, sizes.ngram_size - 1
        self.drafts = torch.zeros(shape, dtype=torch.int64, device=runner.device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No graph of its own: a few launches, all of them device-driven."""

    def capture(self) -> None:
        """Nothing to capture."""

    def propose(
        self,
        input_batch: InputBatch,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Put the batch's next trees away, where their requests find them.

        Returns:
            [B, N-1] int64, the first candidate of each request.
        """
        drafts = self.drafts[: input_batch.num_reqs]
        if dummy_run or not self.step.plan.drafts:
            return drafts.zero_()
        states, idx_mapping = self.runner.req_states, input_batch.idx_mapping
        batch = self.step.plan.batch(
            self.runner.block_tables.input_block_tables[0],
            states.num_computed_tokens.gpu[idx_mapping],
            states.last_sampled_tokens[idx_mapping, 0].int(),
        )
        candidates = self.sizes.verification_set_size
        tree = self.ops.propose(self.pages, batch, candidates, self.bigrams)
        self.waiting.store(tree, idx_mapping, drafts)
        return drafts
