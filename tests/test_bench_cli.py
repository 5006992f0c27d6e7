# SPDX-License-Identifier: Apache-2.0
"""`vllm bench` measures lookahead as `vllm serve` runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hf_config import write_config

TOKENIZER = Path(__file__).parent.parent / "demo" / "model"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "bench",
    [
        ["latency", "--batch-size=1", "--num-iters=1", "--num-iters-warmup=1"]
        + ["--input-len=8", "--output-len=8"],
        ["throughput", "--num-prompts=2"]
        + ["--random-input-len=8", "--random-output-len=8"],
    ],
    ids=lambda bench: bench[0],
)
def test_bench_runs_lookahead(bench: list[str], tmp_path: Path) -> None:
    # `bench latency` draws token ids below 10000.
    model = write_config(tmp_path, vocab_size=10_000, hidden_size=64, head_dim=32)
    command = [str(Path(sys.executable).with_name("vllm")), "bench", *bench]
    command += ["--model", model, "--load-format=dummy", "--tokenizer", str(TOKENIZER)]
    command += ["--speculative", "lookahead", "--lookahead-ngram-size", "4"]
    command += ["--enforce-eager", "--max-num-seqs=2", "--kv-cache-memory-bytes=64M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "LookaheadConfig(window_size=0, ngram_size=4" in output
    assert "Avg latency" in output or "Throughput" in output
