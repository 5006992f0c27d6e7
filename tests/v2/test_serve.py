# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` on the V2 engine, over HTTP."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engines import MODEL, Engines
from tests.harness.environment import v2_environment
from tests.harness.jobs import prompts, request
from tests.harness.models import make_model

STEP = 64  # tokens that a step has room for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    model = make_model(folder / "model", *MODEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--speculative", "lookahead", "--port", str(port)]
    command += ["--lookahead-window-size=3", "--lookahead-ngram-size=3"]
    command += ["--lookahead-verification-set-size=3", "--dtype=float32"]
    command += ["--max-model-len=256", "--block-size=32", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes=4194304", "--max-num-seqs=4"]
    command += [f"--max-num-batched-tokens={STEP}", "--served-model-name=tiny"]
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=v2_environment()
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_until_up(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-4000:]}")


def complete(url: str, **body: Any) -> list[int]:
    """The tokens of a completion."""
    body = {"model": "tiny", "return_token_ids": True, "ignore_eos": True} | body
    call = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]


def at_once(url: str, jobs: list[dict[str, Any]]) -> list[list[int]]:
    """Send jobs of `Engines.run`; return when all of them have run side by side."""
    assert metric(url, "vllm:num_requests_running") == 0
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers: list[Future] = []
        for job in jobs:
            params = dict(job["params"])
            if xargs := params.pop("extra_args", None):
                params["vllm_xargs"] = xargs
            answers.append(pool.submit(complete, url, prompt=job["prompt"], **params))
        while metric(url, "vllm:num_requests_running") < len(jobs):
            assert not any(answer.done() for answer in answers)
            time.sleep(0.02)
        return [answer.result() for answer in answers]


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = (x.split()[-1] for x in lines if x.split("{")[0] == name)
    return float(value)


def plain(engines: Engines, jobs: list[dict[str, Any]]) -> list[list[int]]:
    return [output["tokens"] for output in engines.run([jobs])["outputs"]]


def test_batch(server: str, engines: Engines) -> None:
    """Greedy, seeded, smaller and off, side by side."""
    a, b, c, d = prompts(4, seed=30)
    small = {"lookahead_window_size": 0, "lookahead_ngram_size": 2}
    jobs = [
        request(a),
        request(b, temperature=0.7, seed=5),
        request(c, extra_args=small),
        request(d, extra_args={"lookahead": 0}),
    ]
    assert at_once(server, jobs) == plain(engines, jobs)
    assert metric(server, "vllm:spec_decode_num_drafts_total") > 0
    assert metric(server, "vllm:spec_decode_num_accepted_tokens_total") > 0


def test_chunked_prefill_and_prefix_cache(server: str, engines: Engines) -> None:
    """A prompt that takes two steps to read, and others that begin with it."""
    shared = list(range(2, 86))
    assert len(shared) > STEP
    jobs = [request(shared + [5], max_tokens=40), request([9, 8, 7], max_tokens=30)]
    expected = plain(engines, jobs)
    assert at_once(server, jobs) == expected
    hits = metric(server, "vllm:prefix_cache_hits_total")
    again = [request(shared + [6]), request(shared + [7], temperature=0.7, seed=5)]
    assert at_once(server, again) == plain(engines, again)
    assert metric(server, "vllm:prefix_cache_hits_total") == hits + 2 * 64


def test_refusal(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(server, prompt=[5, 6], vllm_xargs={"lookahead_ngram_size": 99})
    assert refused.value.code == 400
