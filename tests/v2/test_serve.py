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
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engines import MODEL, Engines
from tests.harness.environment import v2_environment
from tests.harness.jobs import prompts, request
from tests.harness.models import make_model


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
    command += ["--max-num-batched-tokens=512", "--served-model-name=tiny"]
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


def complete(url: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "return_token_ids": True, "ignore_eos": True} | body
    call = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(call, timeout=300) as answer:
        return json.load(answer)


def test_completions(server: str, engines: Engines) -> None:
    text = prompts(1, seed=30)[0]
    jobs = [[request(text), request(text, temperature=0.7, seed=5)]]
    greedy, seeded = (o["tokens"] for o in engines.run(jobs)["outputs"])
    body = {"prompt": text, "max_tokens": 12}

    answer = complete(server, **body, temperature=0.0)
    assert answer["choices"][0]["token_ids"] == greedy
    answer = complete(server, **body, temperature=0.7, seed=5)
    assert answer["choices"][0]["token_ids"] == seeded
    off = {"vllm_xargs": {"lookahead": 0}}
    answer = complete(server, **body, **off, temperature=0.0)
    assert answer["choices"][0]["token_ids"] == greedy

    with pytest.raises(urllib.error.HTTPError) as refused:
        complete(server, **body, vllm_xargs={"lookahead_ngram_size": 99})
    assert refused.value.code == 400
    metrics = urllib.request.urlopen(f"{server}/metrics").read().decode()
    (drafts,) = (
        line.split()[-1]
        for line in metrics.splitlines()
        if line.startswith("vllm:spec_decode_num_drafts_total")
    )
    assert float(drafts) > 0
