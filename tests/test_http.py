# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --speculative lookahead`, as a client sees it."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from vllm.utils.network_utils import get_open_port

MODEL = Path(__file__).parent.parent / "demo" / "model"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = get_open_port()
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm), "serve", str(MODEL), "--served-model-name", "demo"]
    command += ["--speculative", "lookahead", "--lookahead-window-size", "7"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", "256M"]
    command += ["--chat-template", TEMPLATE, "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    url = f"http://localhost:{port}"
    deadline = time.monotonic() + 600
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/health").close()
            break
        except OSError:
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


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


def test_metrics_are_vllms(server: str, client: OpenAI) -> None:
    complete(client, False)
    with urllib.request.urlopen(f"{server}/metrics") as page:
        lines = page.read().decode().splitlines()
    (drafts,) = [x for x in lines if x.startswith("vllm:spec_decode_num_drafts_total")]
    assert float(drafts.split()[-1]) > 0


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
