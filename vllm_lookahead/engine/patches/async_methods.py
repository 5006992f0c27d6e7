# SPDX-License-Identifier: Apache-2.0
"""Let lookahead run with async scheduling.

Why: `VllmConfig` keeps the methods that async scheduling accepts as a list of
names, and knows no other way to ask a method.
Remove: with vLLM 0.32; from 0.33 on, the list binds the V1 runner only.
"""

from typing import Any, Literal, get_args

from vllm_lookahead.params import METHOD

TARGET = "vllm.config.vllm:NgramGPUTypes"


def wrap(original: Any) -> Any:
    return Literal[*get_args(original), METHOD]
