# SPDX-License-Identifier: Apache-2.0
"""Propose: at the end of a step, build the trees of the next."""

from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.v2.outputs import Copied
from vllm_lookahead.engine.v2.trees import StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.gather import Starts, gather_starts
from vllm_lookahead.triton_kernels.ops import TritonOps


class LookaheadSpeculator(BaseSpeculator):
    """Drafts without a draft model: what it drafts from is in the block pages.

    Attributes:
        pages: allocated with the K/V cache.
        bigrams: [V, R] int32 and their log-probabilities, see `core.draft.bigrams`; V
            is 0 before the model was asked.
        drafts: [max_num_reqs, N-1] int64, what the scheduler is told.
        chances: of the nodes drafted last, for the scheduler; None if it does not ask.
        corpus: other requests' blocks, if they are drafted from.
    """

    supports_mm_inputs = False
    draft_logits = None
    draft_token_confidence_probs = None
    chances: Copied | None = None
    pages: BlockPages
    corpus: Corpus | None = None

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
        self.bigrams = (
            torch.zeros(0, NUM_SUCCESSORS, dtype=torch.int32, device=runner.device),
            torch.zeros(0, NUM_SUCCESSORS, device=runner.device),
        )
        self.starts = Starts.allocate(runner.max_num_reqs, runner.device)
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
        starts = self._starts(input_batch.idx_mapping)
        batch = self.step.plan.batch(
            self.runner.page_table(starts.position), starts.position, starts.root
        )
        candidates = self.sizes.verification_set_size
        hints = self.hints(starts.temperature, starts.seeds)
        if self.corpus:
            ids = input_batch.req_ids
            batch, hints.before = self.corpus.behind_others(batch, ids)
        tree, chances = self.ops.draft(self.pages, batch, hints, candidates)
        self.waiting.store(tree, chances, input_batch.idx_mapping, drafts)
        if self.runner.trimmer:
            self.chances = Copied(
                self._drafting(input_batch), chances[:, 1:], self.runner
            )
        return drafts

    def _drafting(self, input_batch: InputBatch) -> list[str | None]:
        """Each request of the batch, but for those whose prompt is not read yet."""
        tokens = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        read = (tokens >= input_batch.prefill_len_np).tolist()
        pairs = zip(input_batch.req_ids, read, strict=True)
        return [name if is_read else None for name, is_read in pairs]

    def _starts(self, idx_mapping: torch.Tensor) -> Starts:
        requests, sampling = self.runner.req_states, self.runner.sampler.sampling_states
        return gather_starts(
            self.starts,
            idx_mapping,
            requests.num_computed_tokens.gpu,
            requests.last_sampled_tokens,
            sampling.temperature.gpu,
            sampling.seeds.gpu,
        )

    def hints(self, temperature: torch.Tensor, seeds: torch.Tensor) -> Hints:
        """What is known besides the pages: bigrams, and the sampler's noise.

        Args:
            temperature: [B] float32.
            seeds: [B] int64.
        """
        if self.runner.sampler.use_fp64_gumbel:  # other noise, that is not looked into
            temperature = torch.zeros_like(temperature)
        return Hints(*self.bigrams, temperature, seeds[:, None], gpu_noise)

    def warm_up(self, block_table: torch.Tensor) -> tuple[RequestBatch, Hints]:
        """Compile what gathers, before there is a request.

        Args:
            block_table: vLLM's.

        Returns:
            what a first request drafts from.
        """
        index = torch.zeros(1, dtype=torch.int64, device=self.drafts.device)
        starts = self._starts(index)
        hints = self.hints(starts.temperature, starts.seeds)
        nothing = torch.zeros(6, 1, dtype=torch.int32, device=self.drafts.device)
        batch = RequestBatch(block_table[:1], *nothing.unbind(0))
        if self.corpus:
            batch, hints.before = self.corpus.behind_others(batch, ["none"])
        return batch, hints
