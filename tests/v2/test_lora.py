# SPDX-License-Identifier: Apache-2.0
"""Requests with different LoRA adapters side by side, on V2."""

from pathlib import Path

from tests.harness.adapters import make_adapter
from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, in_batches, request, same_as_plain
from tests.v1.test_lora import ENABLED


def test_two_adapters_and_none(engines: Engines, tmp_path: Path) -> None:
    adapters = [(n, str(make_adapter(tmp_path / f"{n}", seed=n))) for n in (1, 2)]
    bare = request([20, 21, 22] * 4, max_tokens=12)
    requests = [bare, *(bare | {"lora": adapter} for adapter in adapters)]
    # Alone, then two adapters beside a request without.
    jobs = [*in_batches(requests, 1), requests]
    result = same_as_plain(engines, jobs, **ENABLED)
    assert result["metrics"][ACCEPTED] > 0
    texts = {tuple(o["tokens"]) for o in result["outputs"]}
    assert len(texts) == 3
