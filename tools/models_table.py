# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: run every architecture of the tests on both engines.

    python -m tools.models_table

Outputs are compared with plain vLLM's on the same engine, token for token, in fp32.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.harness.architectures import ARCHITECTURES, make_architecture
from tests.harness.engines import Engines
from tests.harness.environment import v1_environment, v2_environment
from tests.harness.jobs import ACCEPTED, DRAFTED
from tests.harness.kinds import CHAIN, EVERY_KIND, MORE_MODELS, mixed_jobs, tight
from tests.v2.test_chains import JOBS, OPTIONS

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models, as tested

Written by `python -m tools.models_table` with vLLM {version}, on a CPU; not by hand.
Each is a model of two layers with random weights, made by
[`tests/harness/architectures.py`](../tests/harness/architectures.py), and its outputs
are compared with plain vLLM's on the same engine, token for token, in fp32, greedy and
seeded. In V1 prompts are read in parts, prefixes shared, requests preempted, and some
do not draft; latent attention reads prompts whole on a CPU, and shares none. V2 runs
its Triton kernels on Triton's interpreter. All were run in chains of four nodes, also
where trees may branch. What may be drafted is what
`python -m vllm_lookahead.doctor MODEL` says.

| architecture | drafts | V1: accepted of drafted | V2: accepted of drafted |
|---|---|---|---|
"""


def doctor(model: Path) -> str:
    """Its last line, without what it is about."""
    command = [sys.executable, "-m", "vllm_lookahead.doctor", str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    line = done.stdout.strip().splitlines()[-1]
    kind, _, text = line.partition(": ")
    return text if kind == "drafts" else line.replace(f" (model {model})", "")


def compared(run: Callable[[dict[str, int] | None], dict[str, Any]]) -> str:
    """A cell: how many drafts were accepted, if all tokens are plain vLLM's."""
    try:
        plain, result = run(None), run(CHAIN)
    except pytest.fail.Exception as error:
        return str(error).splitlines()[0].partition(": ")[2] or str(error)[:80]
    tokens = [[o["tokens"] for o in r["outputs"]] for r in (plain, result)]
    if tokens[0] != tokens[1]:
        return "other tokens than plain vLLM's"
    metrics = result["metrics"]
    return f"{metrics[ACCEPTED]:.0f} of {metrics[DRAFTED]:.0f}"


def row(name: str, folder: Path, v1: Engines, v2: Engines) -> str:
    said = doctor(make_architecture(folder / name, name))
    options = {**EVERY_KIND, **MORE_MODELS}.get(name, {})
    if said.startswith("refused"):
        return f"| {name} | {said} | - | - |\n"
    roomy = {"max_model_len": 256, "max_num_batched_tokens": 1024}

    def run_v1(sizes: dict[str, int] | None) -> dict[str, Any]:
        limits = roomy if sizes is None else tight(name)
        jobs = mixed_jobs(6, max_tokens=40)
        return v1.run(jobs, sizes, model=[name], **limits, **options)

    def run_v2(sizes: dict[str, int] | None) -> dict[str, Any]:
        return v2.run(JOBS, sizes, model=[name], **OPTIONS, **options)

    return f"| {name} | {said} | {compared(run_v1)} | {compared(run_v2)} |\n"


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "v1").mkdir()
        (folder / "v2").mkdir()
        v1 = Engines(folder / "v1", v1_environment())
        v2 = Engines(folder / "v2", v2_environment())
        text = HEAD.format(version=vllm.__version__)
        for name in names or ARCHITECTURES:
            text += row(name, folder, v1, v2)
            PAGE.write_text(text)
        v1.close()
        v2.close()


if __name__ == "__main__":
    main(sys.argv[1:])
