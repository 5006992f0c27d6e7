# SPDX-License-Identifier: Apache-2.0
"""Refuse a bad request before the server starts to answer it.

Why: the server calls `AsyncLLM.generate` and sends "200 OK" before it iterates over
a streamed answer; only then does the engine look at the request.
Remove: when upstream validates sampling parameters ahead of a streamed response.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm_lookahead.params import METHOD

TARGET = "vllm.v1.engine.async_llm:AsyncLLM.generate"


def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        config = self.vllm_config.speculative_config
        if config is not None and config.method == METHOD:
            sampling_params._validate_spec_decode(config)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate
