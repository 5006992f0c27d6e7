# SPDX-License-Identifier: Apache-2.0
"""`LLM` and `AsyncLLM` with lookahead, in the processes that vLLM starts by default."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.harness.environment import HERE
from tests.harness.jobs import ACCEPTED, DRAFTS

MODEL = HERE.parent.parent / "demo" / "model"
SIZES = {"window_size": 5, "ngram_size": 4, "verification_set_size": 5}
OPTIONS = {
    "model": str(MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,
}


def run(
    sizes: dict[str, int], script: str = "offline.py", **env: str
) -> dict[str, Any]:
    config = {"method": "lookahead", **sizes}
    options = json.dumps(OPTIONS | {"speculative_config": config})
    done = subprocess.run(
        [sys.executable, str(HERE / script), options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(HERE)} | env,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (result,) = [x for x in done.stdout.splitlines() if x.startswith("{")]
    return json.loads(result)


@pytest.fixture(scope="module")
def one_thread() -> dict[str, Any]:
    return run({}, VLLM_CPU_OMP_THREADS_BIND=first_cores(1))


def first_cores(count: int) -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))


def test_the_defaults(one_thread: dict[str, Any]) -> None:
    """What they say is what they say with lookahead off; a step is one call."""
    assert one_thread["on"] == one_thread["off"]
    assert all(one_thread["on"])
    assert one_thread["engine_core"] == "SyncMPClient"
    assert one_thread["metrics"][DRAFTS] > 0
    assert one_thread["metrics"][ACCEPTED] > 0
    assert one_thread["steps"] > 40


def test_a_bad_value_is_refused_and_the_next_request_served(
    one_thread: dict[str, Any],
) -> None:
    assert "lookahead_ngram_size=99 is not allowed: " in one_thread["refused"]
    assert "a whole number from 2 to " in one_thread["refused"]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has one thread")
def test_more_than_one_thread() -> None:
    """Trees are attended by PyTorch there."""
    result = run(SIZES, VLLM_CPU_OMP_THREADS_BIND=first_cores(2))
    assert result["threads"] == 2
    assert result["on"] == result["off"]
    assert result["metrics"][ACCEPTED] > 0


def test_async_llm() -> None:
    """Streams beside each other, after one was refused and one dropped midway."""
    result = run({}, "async_llm.py", VLLM_CPU_OMP_THREADS_BIND=first_cores(1))
    assert "lookahead_ngram_size=99 is not allowed: " in result["refused"]
    tokens_on, tokens_off = ([t for t, _ in result[k]] for k in ("on", "off"))
    assert tokens_on == tokens_off
    assert [len(tokens) for tokens in tokens_on] == [40, 40, 40]
    # What is said in two steps may be handed over at once, with lookahead or without.
    pieces_on, pieces_off = (sum(n for _, n in result[k]) for k in ("on", "off"))
    assert pieces_on < 0.9 * pieces_off
