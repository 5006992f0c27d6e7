# SPDX-License-Identifier: Apache-2.0
"""The narrow side of lookahead: the scheduler sees N-1 drafts per request.

It never sees a draft tree. It reserves the tree's K/V slots, marks each request
that drafts with N-1 placeholders, and the worker expands those into T nodes.
Metrics, token budgets and rollback are then vLLM's own.
"""

from typing import TYPE_CHECKING, Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_lookahead.params import request_params

if TYPE_CHECKING:
    from vllm_lookahead.engine.config import LookaheadConfig

PLACEHOLDER = -1


class LookaheadScheduler(Scheduler):
    """vLLM's scheduler with room for a draft tree, and a switch per request."""

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        # `EngineArgs` names the class before vLLM settles async scheduling.
        if cls is LookaheadScheduler and vllm_config.scheduler_config.async_scheduling:
            from vllm_lookahead.engine.gpu.scheduler import LookaheadAsyncScheduler

            return super().__new__(LookaheadAsyncScheduler)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: LookaheadConfig = self.vllm_config.speculative_config
        self.lookahead = config.params
        self.num_lookahead_tokens = max(
            0, self.lookahead.max_tree_size - self.lookahead.ngram_size
        )
        # Always as many drafts as ever: with such a table, vLLM pads no request that
        # enters with one token left to N, be its lookahead off or not.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (
            self.max_num_running_reqs + 1
        )
        # Scheduler.__init__ derived this before it knew of the tree.
        step_tokens = 1 + self.num_spec_tokens + self.num_lookahead_tokens
        self._spec_decode_step_blocks = sum(
            cdiv(step_tokens, manager.block_size)
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if not isinstance(manager.kv_cache_spec, MambaSpec)
        )

    def num_drafts(self, request: Request) -> int:
        """Draft tokens to schedule for a request: N-1, or 0 when it is off."""
        sampling = request.sampling_params
        # A grammar is checked along one chain, token by token: it runs plain.
        if sampling is None or request.use_structured_output:
            return 0
        params = request_params(sampling.extra_args, self.lookahead)
        return params.ngram_size - 1 if params else 0

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if not request.is_prefill_chunk:
                request.spec_token_ids = [PLACEHOLDER] * self.num_drafts(request)

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        drafted = getattr(model_runner_output, "num_draft_tokens", None)
        if drafted is not None:
            placeholders = scheduler_output.scheduled_spec_decode_tokens
            scheduler_output.num_invalid_spec_tokens = {
                request_id: len(tokens) - drafted.get(request_id, 0)
                for request_id, tokens in placeholders.items()
            }
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        if num_draft_tokens == invalid:  # nothing was drafted
            return spec_decoding_stats
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
