# SPDX-License-Identifier: Apache-2.0
"""Where lookahead cannot run, tell whoever asks for it why.

Why: hooks written for one version of vLLM may give wrong tokens on another, and where
a hook is missing vLLM would call the method unknown.
Remove: never; a vLLM gets it instead of what makes lookahead run.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import vllm

from vllm_lookahead.engine.options import asked_for

reason = (
    f"lookahead was not tested with vLLM {vllm.__version__}: install "
    "vllm>=0.32,<0.34, or start without lookahead"
)
TARGET = "vllm.engine.arg_utils:EngineArgs.create_speculative_config"


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if asked_for(self):
            raise ValueError(reason)
        return original(self, *args, **kwargs)

    return create_speculative_config
