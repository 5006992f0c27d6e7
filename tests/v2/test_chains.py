# SPDX-License-Identifier: Apache-2.0
"""One chain per step in V2, on vLLM's own attention: plain vLLM's tokens."""

from typing import Any

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, same_as_plain
from tests.harness.kinds import CHAIN, EVERY_KIND, MORE_MODELS, mixed_jobs

FIRST, SHARED, _ = mixed_jobs(4, max_tokens=8)
JOBS = [FIRST, SHARED[:2], SHARED[2:]]
# Prompts are read in parts, beside chains.
OPTIONS: dict[str, Any] = {"max_model_len": 192, "max_num_batched_tokens": 96}
FAST = "GptOssForCausalLM"  # sinks, and a window in every other layer
slow = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in [*EVERY_KIND, *MORE_MODELS]
    if name != FAST
]


@pytest.mark.parametrize("name", [FAST, *slow])
def test_same_as_plain(engines: Engines, name: str) -> None:
    options = OPTIONS | {**EVERY_KIND, **MORE_MODELS}[name]
    result = same_as_plain(engines, JOBS, CHAIN, model=[name], **options)
    assert result["metrics"][ACCEPTED] > 0
    assert any(o["cached"] for o in result["outputs"]) or "Deepseek" in name
    assert result["usage"] == [0, 0, 0]
