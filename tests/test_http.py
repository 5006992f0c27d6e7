# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --speculative lookahead`, as a client sees it."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from openai import BadRequestError, OpenAI
from vllm.utils.network_utils import get_open_port

MODEL = Path(__file__).parent.parent / "demo" / "model"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"
NGRAM_SIZE = 4
TOOL = {
    "name": "book_a_table",
    "parameters": {
        "type": "object",
        "properties": {
            "name_of_the_restaurant": {"enum": ["The Old Harbour", "Green Garden"]},
            "number_of_guests": {"enum": [2, 4, 8]},
        },
        "required": ["name_of_the_restaurant", "number_of_guests"],
    },
}


class Server(NamedTuple):
    url: str
    log: Path

    def counters(self) -> dict[str, float]:
        """Lookahead's, by name and, of those per position, by that."""
        with urllib.request.urlopen(f"{self.url}/metrics") as page:
            lines = page.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("vllm:spec_decode_") and "_created{" not in line:
                name, labels, value = re.split("[{}]", line)
                at = re.findall('position="([0-9]+)"', labels)
                found["_".join([name.removeprefix("vllm:spec_decode_"), *at])] = value
        return {name: float(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = get_open_port()
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(MODEL), "--served-model-name", "demo"]
    command += ["--speculative", "lookahead", "--lookahead-window-size", "7"]
    command += ["--lookahead-ngram-size", str(NGRAM_SIZE)]
    command += ["--lookahead-verification-set-size", "3"]
    command += ["--per-request-spec-decode-metrics", "detailed"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", "256M"]
    command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    command += ["--structured-outputs-config", json.dumps(grammars)]
    command += ["--chat-template", TEMPLATE, "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"VLLM_LOG_STATS_INTERVAL": "1"},
        )
    url = f"http://localhost:{port}"
    deadline = time.monotonic() + 600
    try:
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        yield Server(url, log)
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client: OpenAI, stream: bool, **xargs: object) -> str:
    answer = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        stream=stream,
        extra_body={"vllm_xargs": xargs},
    )
    parts = answer if stream else [answer]
    return "".join(part.choices[0].text for part in parts)


def chat(client: OpenAI, stream: bool, **xargs: object) -> str:
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=48,
        temperature=0,
        stream=stream,
        extra_body={"vllm_xargs": xargs},
    )
    if not stream:
        return answer.choices[0].message.content
    return "".join(part.choices[0].delta.content or "" for part in answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
def test_good_requests(ask, stream: bool, client: OpenAI) -> None:
    plain = ask(client, stream, lookahead=0)
    assert plain
    assert ask(client, stream) == plain
    assert ask(client, stream, lookahead=True, lookahead_window_size=3) == plain


def call_tool(client: OpenAI, named: bool, **xargs: object) -> dict[str, Any]:
    choice = {"type": "function", "function": {"name": TOOL["name"]}}
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=120,
        temperature=0,
        tools=[{"type": "function", "function": TOOL}],
        tool_choice=choice if named else "auto",
        extra_body={"vllm_xargs": xargs},
    )
    message = answer.choices[0].message
    calls = [call.function.model_dump() for call in message.tool_calls or []]
    return {"content": message.content, "calls": calls}


@pytest.mark.parametrize("named", [True, False])
def test_tool_calls(named: bool, server: Server, client: OpenAI) -> None:
    plain = call_tool(client, named, lookahead=0)
    before = server.counters()
    assert call_tool(client, named) == plain
    after = server.counters()
    assert after["num_accepted_tokens_total"] > before["num_accepted_tokens_total"]
    if named:
        (call,) = plain["calls"]
        assert call["name"] == TOOL["name"]
        json.loads(call["arguments"])  # any JSON, as the tool is not "strict"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [complete, chat])
@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"lookahead": 2}, "lookahead=2 is not allowed: .* from 0 to 1"),
        ({"lookahead_window_size": 8}, "lookahead_window_size=8 .* from 0 to 7"),
        ({"lookahead_window_size": [1]}, r"lookahead_window_size=\[1\] is not"),
        ({"lookahead_widow_size": 5}, "unknown option lookahead_widow_size=5: use"),
    ],
)
def test_bad_requests(
    ask, stream: bool, xargs: dict, words: str, client: OpenAI
) -> None:
    with pytest.raises(BadRequestError, match=words) as error:
        ask(client, stream, **xargs)
    assert error.value.status_code == 400
    assert ask(client, stream)


def test_samplers_that_rejection_sampling_refuses(client: OpenAI) -> None:
    answer = client.completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=8,
        seed=1,
        logit_bias={"5": 1.0},
        extra_body={"min_p": 0.1},
    )
    assert answer.choices[0].text


def test_metrics_are_vllms(server: Server, client: OpenAI) -> None:
    """Tokens of the window are no drafts: these are the N-1 of one candidate."""
    before = server.counters()
    body: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 48}
    answer = client.completions.create(**body, temperature=0)
    after = server.counters()
    counted = {name: int(after[name] - before[name]) for name in after}
    drafts, drafted = counted["num_drafts_total"], counted["num_draft_tokens_total"]
    accepted = counted["num_accepted_tokens_total"]
    assert 0 < accepted <= drafted <= (NGRAM_SIZE - 1) * drafts
    positions = [
        counted[f"num_accepted_tokens_per_pos_total_{i}"] for i in range(NGRAM_SIZE - 1)
    ]
    assert sum(positions) == accepted
    assert positions == sorted(positions, reverse=True)
    assert f"num_accepted_tokens_per_pos_total_{NGRAM_SIZE - 1}" not in counted

    metrics = answer.model_dump()["metrics"]["speculative_decoding"]
    assert metrics["num_accepted_draft_tokens"] == accepted
    assert metrics["num_draft_tokens"] == drafted
    steps = list(zip(metrics["per_step_accepted"], metrics["per_step_drafted"],
                     strict=True))  # fmt: skip
    assert sum(1 for _, drafted in steps if drafted) == drafts
    assert all(0 <= a <= d < NGRAM_SIZE for a, d in steps)


def test_the_log_line_is_vllms(server: Server, client: OpenAI) -> None:
    complete(client, False)
    deadline = time.monotonic() + 20
    while "SpecDecoding metrics: " not in (log := server.log.read_text()):
        assert time.monotonic() < deadline, log
        time.sleep(0.2)
    (line, *_) = [x for x in log.splitlines() if "SpecDecoding metrics: " in x]
    (rates,) = re.findall("Per-position acceptance rate: ([0-9., ]+), Avg", line)
    assert len(rates.split(", ")) == NGRAM_SIZE - 1


def test_bench_serve(server: Server, tmp_path: Path) -> None:
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "bench", "serve", "--base-url", server.url]
    command += ["--model", "demo", "--tokenizer", str(MODEL)]
    command += ["--dataset-name", "random", "--random-input-len", "16"]
    command += ["--random-output-len", "16", "--num-prompts", "4", "--ignore-eos"]
    command += ["--save-result", "--result-dir", str(tmp_path)]
    command += ["--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (4, 0)
    assert result["total_output_tokens"] == 4 * 16
    drafts, tokens = (
        result[f"spec_decode_{x}"] for x in ("num_drafts", "draft_tokens")
    )
    assert 0 < drafts <= tokens <= (NGRAM_SIZE - 1) * drafts
    assert "Acceptance length:" in done.stdout


@pytest.mark.slow
def test_a_bad_size_stops_the_server_in_one_line() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(MODEL), "--speculative", "lookahead"]
    done = subprocess.run(
        [*command, "--lookahead-ngram-size", "99"],
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "argument --lookahead-ngram-size: ngram_size=99 is not allowed: "
        "it must be a whole number from 2 to 16"
    )
