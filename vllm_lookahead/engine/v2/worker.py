# SPDX-License-Identifier: Apache-2.0
"""The V2 worker: vLLM's, with a lookahead model runner."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_lookahead.engine.page_memory import cache_groups, page_share
from vllm_lookahead.engine.patches import install
from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner
from vllm_lookahead.engine.v2.warm_up import warm_up

if current_platform.is_cpu():
    from vllm.v1.worker.cpu import model_runner as cpu_runner
    from vllm.v1.worker.cpu_worker import CPUWorker as BaseWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as BaseWorker

logger = init_logger("vllm.lookahead")


class LookaheadWorker(BaseWorker):
    model_runner: Any

    def _make_model_runner(self) -> Any:
        return LookaheadModelRunner(self.vllm_config, self.device)

    def init_device(self) -> None:
        try:
            install(["sampler_warmups"])
        except Exception as error:  # the engine starts, if two minutes later
            logger.warning("vLLM's sampler will be warmed up for nothing: %r", error)
        if not current_platform.is_cpu():
            super().init_device()
            return
        # The CPU worker does not ask `_make_model_runner`: it takes a module's global.
        original = cpu_runner.CPUModelRunner
        cpu_runner.CPUModelRunner = LookaheadModelRunner
        try:
            super().init_device()
        finally:
            cpu_runner.CPUModelRunner = original

    def compile_or_warm_up_model(self) -> Any:
        self.model_runner.ask_model()
        warm_up(self.model_runner)
        return super().compile_or_warm_up_model()

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Memory for K/V, less what the pages take."""
        groups = cache_groups(self.vllm_config, self.get_kv_cache_spec())
        share = page_share(groups, self.model_runner.lookahead)
        return int(super().determine_available_memory() * (1 - share))
