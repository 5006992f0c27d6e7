# SPDX-License-Identifier: Apache-2.0
"""Schedule asynchronously on a CPU, where vLLM does not, and call workers once a step.

And synchronously where attention is latent and the runner is V2.

Why: the CPU platform turns async scheduling off for every configuration. A lookahead
step waits for nothing from the scheduler, so the next one can be scheduled meanwhile.
Remove: when the CPU platform leaves the choice to the model runner, and the executor
sends `execute_model` and `sample_tokens` together.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_lookahead.engine.options import asked_for

TARGET = "vllm.engine.arg_utils:EngineArgs.create_engine_config"


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        if not asked_for(self):
            return config

        from vllm_lookahead.engine.support import V1_EXECUTOR, V1_WORKER, V2_WORKER

        parallel = config.parallel_config
        if parallel.worker_cls == V2_WORKER and config.model_config.use_mla:
            # Latent attention reads rows of several tokens at lengths that the host
            # knows: of a step scheduled ahead they count drafts that were rejected.
            config.scheduler_config.async_scheduling = False
        if parallel.worker_cls == V1_WORKER:
            config.scheduler_config.async_scheduling = (
                self.async_scheduling is not False
            )
            # Images reach a worker by `execute_model` alone.
            has_images = config.model_config.is_multimodal_model
            if parallel.distributed_executor_backend == "mp" and not has_images:
                parallel.distributed_executor_backend = V1_EXECUTOR
        return config

    return create_engine_config
