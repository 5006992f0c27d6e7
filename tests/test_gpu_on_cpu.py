# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark goes through its stages on Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.gpu import run_all
from benchmarks.gpu.stages import all_stages
from benchmarks.gpu.summary import CANNOT_SHOW, INTERPRETER

STAGES = [stage.name for stage in all_stages(run_all.parse([]))]


def go(output: Path, *options: str) -> tuple[dict[str, dict], list[str]]:
    """The records, and the lines printed."""
    command = [sys.executable, "-m", "benchmarks.gpu.run_all", "--on-cpu"]
    done = subprocess.run(
        [*command, "--output", str(output), *options],
        cwd=run_all.ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert not done.returncode, done.stdout + done.stderr
    return run_all.read_records(output), done.stdout.splitlines()


def check(records: dict[str, dict], lines: list[str], stages: list[str]) -> None:
    assert list(records) == stages
    for name, record in records.items():
        assert "failed" not in record, (name, record["failed"], record["log"])
        assert record["about"]["gpu"] == INTERPRETER
    assert "A run on a CPU: no number here is a measurement." in lines
    assert set(CANNOT_SHOW) <= set(lines)


def test_kernels_and_starts(tmp_path):
    stages = ["kernel-tests", "engine-start", "kernel-tiles"]
    records, lines = go(tmp_path, "--stages", ",".join(stages))
    check(records, lines, stages)
    engines = records["engine-start"]["result"]["engines"]
    assert [e["runner"] for e in engines.values()] == [["V2"], ["V2"]]
    assert engines["lookahead"]["outputs"] == engines["plain"]["outputs"]
    assert "- Which sizes and which tiles are best? (engine-sizes: not run)" in lines
    _, lines = go(tmp_path, "--stages", "engine-start")
    assert "engine-start: there already" in lines


@pytest.mark.slow
def test_every_stage(tmp_path):
    records, lines = go(tmp_path)
    check(records, lines, STAGES)
    pairs = records["engine-float32"]["result"]["pairs"]
    assert len(pairs) == 6
    assert not any(pair["differ"] for pair in pairs.values())
    rows = records["step-cost"]["result"]["rows"]
    trees = {row["nodes"] for row in rows if row["server"] == "15/5/15"}
    assert trees == {1, 8, 16, 32, 64, 120}
    assert {row["context"] for row in rows} == {20, 40}
    environment = records["engine-float32"]["environment"]
    assert environment["TRITON_F32_DEFAULT"]["value"] == "ieee"
    answered = ("kernel", "step", "tokens plain")
    unanswered = lines[lines.index("Unanswered, or in part:") + 1 :]
    assert not any(word in line for line in unanswered for word in answered)
