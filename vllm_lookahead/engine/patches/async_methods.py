# SPDX-License-Identifier: Apache-2.0
"""Let lookahead run with async scheduling.

Why: `VllmConfig` keeps the methods that async scheduling accepts as a list of
names, from 0.33 on for the V1 runner only, and knows no other way to ask a method.
Remove: when upstream asks the method, or has no V1 runner any more.
"""

from typing import Any, Literal, get_args

from vllm_lookahead.params import METHOD

TARGET = "vllm.config.vllm:NgramGPUTypes"


def wrap(original: Any) -> Any:
    return Literal[*get_args(original), METHOD]
