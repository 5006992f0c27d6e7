# SPDX-License-Identifier: Apache-2.0
"""Two ranks draft the same trees, though each has a clock of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.environment import v1_environment
from tests.harness.models import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each rank"),
]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], disable_log_stats=False, **json.loads(sys.argv[2]))
    sampling = [
        SamplingParams(max_tokens=150, ignore_eos=True, temperature=t, seed=i)
        for i, t in enumerate([0.0, 0.5] * 4)
    ]
    prompts = [{"prompt_token_ids": list(range(2 + i, 40, 2))} for i in range(8)]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    result = {
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    with open(sys.argv[3], "w") as file:
        json.dump(result, file)
"""


def generate(folder: Path, model: Path, **options: Any) -> dict[str, Any]:
    script, output = folder / "generate.py", folder / "output.json"
    script.write_text(SCRIPT)
    options = {
        "tensor_parallel_size": 2,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 16 << 20,
        **options,
    }
    environment = v1_environment() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        [sys.executable, script, model, json.dumps(options), output],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(output.read_text())


def test_two_ranks(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", seed=0, num_kv_heads=2)
    plain = generate(tmp_path, model)
    result = generate(tmp_path, model, speculative_config={"method": "lookahead"})
    assert result["tokens"] == plain["tokens"]
    assert result["accepted"] > 0
