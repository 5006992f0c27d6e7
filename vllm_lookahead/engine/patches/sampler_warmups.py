# SPDX-License-Identifier: Apache-2.0
"""Warm up vLLM's sampler as a plain engine does.

Why: from vLLM 0.33 on, an engine with any `speculative_config` compiles every variant
of the native top-k and top-p kernels when it starts, about two minutes on CUDA, for
rejection samplers mask logits with them. Lookahead samples with the request's own
sampler, so it needs what plain vLLM needs.
Remove: when upstream asks the speculative method, or the warm-up takes seconds.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.config import get_current_vllm_config_or_none
from vllm.platforms import current_platform

from vllm_lookahead.params import METHOD

TARGET = "vllm.v1.sample.ops.topk_topp_sampler:register_top_k_top_p_warmups"


def wrap(original: Callable[[], None]) -> Callable[[], None]:
    @wraps(original)
    def register_top_k_top_p_warmups() -> None:
        config: Any = get_current_vllm_config_or_none()
        speculative = config and config.speculative_config
        is_lookahead = speculative is not None and speculative.method == METHOD
        if not (is_lookahead and current_platform.is_cuda()):
            original()

    return register_top_k_top_p_warmups
