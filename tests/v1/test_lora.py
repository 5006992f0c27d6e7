# SPDX-License-Identifier: Apache-2.0
"""Requests with different LoRA adapters side by side."""

from pathlib import Path
from typing import Any

import pytest

from tests.harness.adapters import RANK, make_adapter
from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, in_batches, prompts, request, same_as_plain
from tests.v1.test_lossless import CHAIN, FULL

# One slot stays empty: on a CPU vLLM 0.32 adds the last one's adapter of the head to
# the logits of requests without any.
ENABLED = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}


@pytest.mark.parametrize("lookahead", [CHAIN, FULL], ids=["chain", "full"])
def test_two_adapters_and_none(
    engines: Engines, tmp_path: Path, lookahead: dict[str, int]
) -> None:
    adapters = [(n, str(make_adapter(tmp_path / f"{n}", seed=n))) for n in (1, 2)]
    requests = []
    for i, text in enumerate(prompts(4, seed=70)):
        own: dict[str, Any] = {"temperature": 0.7, "seed": i} if i % 2 else {}
        one = request(text, max_tokens=30, **own)
        requests += [one, *(one | {"lora": adapter} for adapter in adapters)]
    # Alone, then two adapters beside a request without.
    jobs = in_batches(requests[:3], 1) + in_batches(requests, 3)
    result = same_as_plain(engines, jobs, lookahead, **ENABLED)
    assert result["metrics"][ACCEPTED] > 0
    bare, one, two = (o["tokens"] for o in result["outputs"][:3])
    assert bare != one != two != bare
