# SPDX-License-Identifier: Apache-2.0
"""Make `method="lookahead"` a `LookaheadConfig`, and bring its engine along.

Why: `SpeculativeConfig` has a closed list of methods, and `EngineArgs` names its
class. Worker and scheduler follow from the same arguments.
Remove: when upstream has a registry of speculative methods.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_lookahead.engine.options import asked_for, speculative_options

TARGET = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        if not asked_for(self):
            return original(self, target_model_config, target_parallel_config)

        from vllm_lookahead.engine.config import LookaheadConfig
        from vllm_lookahead.engine.patches import install
        from vllm_lookahead.engine.support import (
            SCHEDULER,
            check_supported,
            why_one_chain,
            worker_class,
        )

        check_supported(target_model_config, target_parallel_config)
        config = LookaheadConfig.from_options(
            speculative_options(self), why_one_chain(target_model_config)
        )
        if self.worker_cls != "auto":
            raise ValueError(
                f"--worker-cls={self.worker_cls} cannot run lookahead, which has a "
                "worker of its own: drop one of them"
            )
        if self.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f"--scheduler-cls={self.scheduler_cls} cannot run lookahead, which "
                "has a scheduler of its own: drop one of them"
            )
        if self.kv_transfer_config is not None:
            connector = self.kv_transfer_config.kv_connector
            raise ValueError(
                f"kv_transfer_config with kv_connector={connector} cannot be combined "
                "with lookahead: a connector would store the K/V of drafts that were "
                "not accepted; drop one of them"
            )
        # Not with the others: its module is slow to import, and servers need it.
        install(["generate"])
        target_parallel_config.worker_cls = worker_class()
        self.scheduler_cls = SCHEDULER
        config.target_model_config = target_model_config
        config.target_parallel_config = target_parallel_config
        return config

    return create_speculative_config
