# SPDX-License-Identifier: Apache-2.0
"""The CPU worker: vLLM's, with a lookahead model runner."""

import copy
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker import cpu_worker

from vllm_lookahead.engine.support import V1_EXECUTOR
from vllm_lookahead.engine.v1 import linear
from vllm_lookahead.engine.v1.model_runner import LookaheadCPUModelRunner
from vllm_lookahead.engine.v1.notify import notify_only_idle_readers


def plain_config(vllm_config: VllmConfig) -> VllmConfig:
    """What vLLM's runner works under, as in plain decoding; ours does the rest."""
    plain = copy.copy(vllm_config)
    plain.speculative_config = None
    plain.scheduler_config = copy.copy(plain.scheduler_config)
    plain.scheduler_config.async_scheduling = False
    # Graphs that call other linear layers or attention, or plain vLLM's, must not come
    # from the same cache.
    own = {"lookahead_linear": linear.is_useful(), "lookahead_attention": True}
    given = plain.additional_config
    if not isinstance(given, dict):
        given = {"given": given.compute_hash()}
    plain.additional_config = given | own
    return plain


class LookaheadCPUWorker(cpu_worker.CPUWorker):
    def init_device(self) -> None:
        notify_only_idle_readers()
        # This process serves lookahead only, so both are swapped for good. The
        # platform always answers CPU_ATTN and the worker takes the module's global.
        lookahead = self.vllm_config.speculative_config
        kind = "Tree" if lookahead.params.can_branch else "Chain"
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            f"vllm_lookahead.engine.v1.attention.{kind}AttentionBackend",
        )
        # It remembers what the last engine of this process registered.
        selector._cached_get_attn_backend.cache_clear()

        def make_runner(
            vllm_config: VllmConfig, device: torch.device
        ) -> LookaheadCPUModelRunner:
            plain = plain_config(vllm_config)
            ahead = vllm_config.scheduler_config.async_scheduling
            return LookaheadCPUModelRunner(plain, device, lookahead, ahead)

        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = make_runner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
        # Outputs are no copies in flight from a device: nothing to wait for in a
        # thread, which would take the interpreter from the next step. In a process of
        # its own a worker has a configuration of its own; else it is the scheduler's.
        if self.parallel_config.distributed_executor_backend in ("mp", V1_EXECUTOR):
            self.vllm_config.scheduler_config.async_scheduling = False

    def execute_and_sample(
        self, scheduler_output: SchedulerOutput, grammar_output: GrammarOutput | None
    ) -> Any:
        """What `LookaheadExecutor` asks for."""
        output = self.execute_model(scheduler_output)
        return self.sample_tokens(grammar_output) if output is None else output

    def compile_or_warm_up_model(self) -> Any:
        self.model_runner.ask_model()
        took = super().compile_or_warm_up_model()
        self.model_runner.time_steps()
        return took

    def determine_available_memory(self) -> int:
        """K/V memory, less what the pages take."""
        available = super().determine_available_memory()
        return int(available * (1 - self.model_runner.page_share()))
