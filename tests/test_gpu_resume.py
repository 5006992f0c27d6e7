# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark goes on where it was stopped, and says what it set and why."""

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import engine_correctness, engine_start, host, run_all
from benchmarks.gpu.stages import OUT, Stage
from benchmarks.gpu.summary import build_summary
from tests.test_gpu_run_all import ABOUT, run, script, writes

# A shell starts in no time on a busy machine, too.
COUNTS_UP = "x=$(cat $0 || echo 0); echo $((x + 1)) > $0; [ $x = 2 ] || sleep 60"
COUNTS_TO_THREE = ["bash", "-c", COUNTS_UP, OUT]
HAS_CHILD = ["bash", "-c", "sleep 60 & echo $! > $0; wait", OUT]


def test_a_stage_that_was_stopped_goes_on(tmp_path):
    stages = [Stage("counts", 2, COUNTS_TO_THREE)]
    for call in range(2):
        record = run(stages, tmp_path)["counts"]
        assert record["failed"] == "stopped after 2 s"
        assert record["result"] == call + 1
    record = run(stages, tmp_path)["counts"]
    assert "failed" not in record
    assert record["result"] == 3
    assert record["seconds"] > 4


def test_with_other_code_it_begins_anew(tmp_path):
    stages = [Stage("counts", 2, COUNTS_TO_THREE)]
    run(stages, tmp_path)
    args = run_all.parse(["--output", str(tmp_path)])
    run_all.run_stages(stages, args, ABOUT | {"commit": "other"})
    assert run_all.read_records(tmp_path)["counts"]["result"] == 1


def test_what_failed_is_run_again_after_the_others(tmp_path, capsys):
    broken = Stage("broken", 60, script("raise SystemExit(3)"))
    run([broken], tmp_path)
    capsys.readouterr()
    run([broken, Stage("new", 60, writes(1))], tmp_path)
    output = capsys.readouterr().out
    assert output.index("new: at most") < output.index("broken: at most")


def test_a_stage_that_needs_more_time_is_left_to_another_call(tmp_path, capsys):
    stages = [Stage("long", 400, writes(1), least=120), Stage("short", 60, writes(2))]
    assert list(run(stages, tmp_path, "--minutes", "1")) == ["short"]
    assert "long: no time is left" in capsys.readouterr().out


def test_a_stage_waits_for_its_model(tmp_path, capsys):
    path = tmp_path / "config.json"
    stages = [Stage("speed", 60, writes(1), uses=path)]
    assert not run(stages, tmp_path / "results")
    assert f"no {path}; run the stage model first" in capsys.readouterr().out
    path.touch()
    assert run(stages, tmp_path / "results")["speed"]["result"] == 1


def test_results_of_two_machines_are_not_mixed(tmp_path):
    run([Stage("one", 60, writes(1))], tmp_path)
    args = run_all.parse(["--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="it holds results of Some GPU, and this is A"):
        run_all.run_stages([], args, {"gpu": "Another"})


def test_few_files_come_back(tmp_path):
    run([Stage("a", 60, writes(1)), Stage("b", 60, script("print(5)"))], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "results.json"]
    log = (tmp_path / "log.txt").read_text()
    assert log.index("=== a: ") < log.index("=== b: ") < log.index("\n5\n")


def test_variables_are_set_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SOMETHING", "7")
    code = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"
    stage = Stage("x", 60, script(code), environment=host.IEEE)
    args = run_all.parse(["--output", str(tmp_path)])
    run_all.run_stages([stage], args, ABOUT | {"flashinfer": False})
    record = run_all.read_records(tmp_path)["x"]
    expected = {
        "VLLM_USE_FLASHINFER_SAMPLER": ("0", "flashinfer cannot be imported"),
        "TRITON_F32_DEFAULT": ("ieee", "as TF32"),
        "VLLM_SOMETHING": ("7", "set before"),
    }
    for name, (value, why) in expected.items():
        assert record["result"][name] == value
        assert record["environment"][name]["value"] == value
        assert why in record["environment"][name]["why"]
    given = host.environment({"flashinfer": True}, {})
    assert "VLLM_USE_FLASHINFER_SAMPLER" not in given


def test_a_bare_clone_is_installed_first(monkeypatch, capsys):
    calls = []

    def pip(command, cwd):
        calls.append((command, cwd))
        return SimpleNamespace(returncode=len(calls) - 1)

    host.install()
    assert not capsys.readouterr().out
    monkeypatch.setattr(host, "installed", lambda: False)
    monkeypatch.setattr(subprocess, "run", pip)
    host.install()
    options = "--no-deps --no-build-isolation --editable ."
    assert options in " ".join(calls[0][0])
    assert calls[0][1] == run_all.ROOT
    assert options in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="externally managed .* older than 77"
    ) as error:
        host.install()
    assert "\n" not in str(error.value)
    assert "--no-deps" not in str(error.value)  # which just failed


def test_metadata_that_lies_about_is_no_installation(monkeypatch, tmp_path):
    """Engines would not find it."""
    egg = tmp_path / "vllm_lookahead.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: vllm-lookahead\n")
    entry = "[vllm.general_plugins]\nlookahead = vllm_lookahead.plugin:register\n"
    (egg / "entry_points.txt").write_text(entry)
    venv.create(tmp_path / "bare", symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    finds = subprocess.run([python, "-c", host.FINDS_PLUGIN], cwd=tmp_path)
    assert not finds.returncode
    assert host.installed()
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.setattr(host, "ROOT", tmp_path)
    assert not host.installed()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert host.installed()


def test_nothing_of_the_package_is_imported_before_it_is_installed():
    code = "import sys, benchmarks.gpu.run_all\n"
    code += "sys.exit(any(m in sys.modules for m in ('vllm_lookahead', 'torch')))"
    assert not subprocess.run([sys.executable, "-c", code], cwd=run_all.ROOT).returncode


@pytest.mark.parametrize("has_psutil", [True, False])
def test_a_stopped_stage_takes_its_children_along(has_psutil, monkeypatch, tmp_path):
    if not has_psutil:
        monkeypatch.setitem(sys.modules, "psutil", None)
    record = run([Stage("parent", 2, HAS_CHILD)], tmp_path)["parent"]
    status = Path(f"/proc/{record['result']}/status")
    for _ in range(50):
        if not status.exists() or "(zombie)" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(record["result"], 9)
    pytest.fail("the child lives")


def test_kernel_tests_that_passed_are_not_run_again(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pathlib\n"
        "ran = pathlib.Path(__file__).with_name('ran')\n"
        "def test_a(): ran.write_text(ran.read_text() + 'a')\n"
        "def test_b(): assert ran.read_text().count('a') > 9\n"
    )
    ran, out = tmp_path / "ran", tmp_path / "out.json"
    ran.write_text("")
    command = [sys.executable, "-m", "benchmarks.gpu.kernel_tests", "--resume"]
    command += ["--out", str(out), str(tests)]
    for calls in ("", "aaaaaaaaaa"):
        subprocess.run(command, cwd=run_all.ROOT, check=True, capture_output=True)
        counts = json.loads(out.read_text())["counts"]
        assert counts == ({"passed": 2} if calls else {"passed": 1, "failed": 1})
        assert ran.read_text().count("a") == max(1, len(calls))
        ran.write_text("aaaaaaaaaa")


class FakeEngine:
    """Says its number of speculative tokens, or dies."""

    started: list[bool] = []

    def __init__(self, options, log, start_limit):
        assert start_limit == 150
        self.lookahead = "speculative_config" in options
        self.started.append(self.lookahead)
        log.write_text("Using FLASH_ATTN attention backend out of potential ones\n")
        if "broken" in options["model"] and self.lookahead:
            raise RuntimeError("the engine died:\nits log\nValueError: no room")

    def run(self, job):
        steps = [[[i], [i + 1]] for i, _ in enumerate(job["prompts"])]
        return {"steps": steps, "seconds": 1.0}

    def close(self):
        pass


def test_an_engine_that_does_not_start_is_told_from_one_that_does(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(engine_start, "EngineProcess", FakeEngine)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="did not run: lookahead"):
        engine_start.main(["--model", "broken", "--out", str(out)])
    engines = json.loads(out.read_text())["engines"]
    assert engines["plain"]["attention"] == ["FLASH_ATTN attention backend"]
    assert engines["plain"]["outputs"][0] == [0, 1]
    assert engines["lookahead"]["failed"] == "ValueError: no room"
    assert len(engines["lookahead"]["log"]) == 1
    record = {"about": ABOUT, "seconds": 1, "command": "", "failed": "exit status 1"}
    record["result"] = {"engines": engines}
    text = build_summary({"engine-start": record}, {})
    assert "- lookahead DID NOT RUN: ValueError: no room\n" in text
    FakeEngine.started.clear()
    engine_start.main(["--model", "good", "--out", str(out), "--resume"])
    assert FakeEngine.started == [True]
    again = json.loads(out.read_text())["engines"]
    assert again["plain"] == engines["plain"]
    assert again["lookahead"]["outputs"] == engines["plain"]["outputs"]


def test_runs_that_are_there_are_not_taken_again(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_correctness, "EngineProcess", FakeEngine)
    out = tmp_path / "out.json"
    options = ["--model", "good", "--output", str(out), "--resume"]
    engine_correctness.main(options)
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 8
    pair = result["pairs"]["seeded plain@1 against seeded lookahead@1"]
    assert pair["differ"] == 0
    assert len(result["pairs"]) == 6
    del result["runs"]["seeded lookahead@8"]
    out.write_text(json.dumps(result))
    FakeEngine.started.clear()
    engine_correctness.main(options)
    assert FakeEngine.started == [True]
    assert json.loads(out.read_text())["runs"].keys() >= {"seeded lookahead@8"}
