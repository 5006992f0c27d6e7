# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's stages, resuming and summary, without a GPU."""

import argparse
import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import engine_correctness, run_all, stages
from benchmarks.gpu.names import LOOKAHEAD
from benchmarks.gpu.stages import OUT, Stage
from benchmarks.gpu.summary import build_summary, targets

STAGES = [
    "kernel-tests",
    "engine-start",
    "engine-float32",
    "engine-correctness",
    "model",
    "step-cost",
    "engine-speed",
    "kernel-times",
    "engine-distinct",
    "engine-baselines",
    "engine-sampled",
    "engine-sizes",
    "step-cost-own",
    "kernel-flex",
    "kernel-tiles",
]
QUESTIONS = {name: f"What does {name} say?" for name in STAGES}
ABOUT = {"gpu": "Some GPU", "torch": "2", "commit": "abc"}


def test_dry_run_lists_every_stage(capsys):
    run_all.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[::2]] == STAGES
    for command in lines[1::2]:
        assert command.startswith(f"  {sys.executable} ")
        assert OUT in command or "widen_model" in command


def test_stages_can_be_chosen(capsys):
    run_all.main(["--dry-run", "--stages", "engine-speed,kernel-tests"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[::2]] == [STAGES[0], STAGES[6]]
    with pytest.raises(SystemExit, match="no kernels; use kernel-tests, "):
        run_all.main(["--dry-run", "--stages", "kernels"])


def test_a_model_of_the_users_own_is_not_widened(capsys, tmp_path):
    run_all.main(["--dry-run", "--model", str(tmp_path)])
    output = capsys.readouterr().out
    assert "widen_model" not in output
    assert output.count(f"--model {tmp_path} ") == 8


def test_engines_fit_on_a_gpu_of_80_gb():
    """All of a speed stage's at once, each with a graph pool and workspace of 3 GB."""
    most, every = 80e9, stages.all_stages(run_all.parse([]))
    for stage in (s for s in every if "--gpu-memory-utilization" in s.command):
        options = dict(zip(stage.command, stage.command[1:], strict=False))
        count = len(options["--methods"].split(","))
        kv = int(options["--kv-cache-memory-bytes"])
        each = stages.MODEL_BYTES + kv + 3e9
        share = float(options["--gpu-memory-utilization"]) * most
        assert each < share
        assert (count - 1) * each + share < most


def test_stages_outlast_two_engines_that_do_not_start():
    """The first stage with time to end both. Of engines one by one none is redone."""
    limits = {}
    for stage in stages.all_stages(run_all.parse([])):
        if "--start-limit" in stage.command:
            start = int(stage.command[stage.command.index("--start-limit") + 1])
            limits[stage.name] = stage.limit, 2 * start
            at_once = "--methods" in stage.command
            assert at_once or "--resume" in stage.command
    assert limits.keys() == {s for s in STAGES if s.startswith(("engine", "step"))}
    assert all(limit >= two for limit, two in limits.values())
    limit, two = limits["engine-start"]
    assert two + 40 <= limit < 500


class Parsed(Exception):
    pass


@pytest.mark.parametrize("size", ["whole", "toy"])
@pytest.mark.parametrize(
    "stage", stages.all_stages(run_all.parse([])), ids=lambda stage: stage.name
)
def test_commands_are_understood(stage, size, monkeypatch, tmp_path):
    """By the parsers of the programs that they call."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.syspath_prepend(run_all.ROOT / "benchmarks")
    if size == "toy":
        stage = stages.toy(stage)
    command = [str(tmp_path) if part == OUT else part for part in stage.command[1:]]
    assert stage.least < stage.limit < 60 * run_all.MINUTES
    if command[0] == "-m":
        command[:2] = [command[1].replace(".", "/") + ".py"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(Parsed):
        runpy.run_path(str(run_all.ROOT / command[0]), run_name="__main__")


def script(code: str, out: bool = True) -> list[str]:
    return [sys.executable, "-c", code, *([OUT] if out else [])]


def writes(value: object) -> list[str]:
    return script(f"import sys; open(sys.argv[1], 'w').write({json.dumps(value)!r})")


def run(stages: list[Stage], output: Path, *options: str) -> dict[str, dict]:
    args = run_all.parse(["--output", str(output), *options])
    run_all.run_stages(stages, args, ABOUT)
    return run_all.read_records(output)


def test_results_are_kept_and_a_failure_stops_nothing(tmp_path, capsys):
    sleep = script("import time; print('before', flush=True); time.sleep(60)")
    stages = [
        Stage("good", 60, writes({"x": 1})),
        Stage("bad", 60, script("raise SystemExit(3)")),
        Stage("slow", 2, sleep),
        Stage("silent", 60, script("pass")),
        Stage("last", 60, writes({"y": 2})),
    ]
    records = run(stages, tmp_path)
    assert records["good"]["result"] == {"x": 1}
    assert records["good"]["about"] == ABOUT
    assert sys.executable in records["good"]["command"]
    assert records["bad"]["failed"] == "exit status 3"
    assert records["slow"]["failed"] == "stopped after 2 s"
    assert records["slow"]["log"] == ["before"]
    assert records["silent"]["failed"] == "it wrote no results"
    assert records["last"]["result"] == {"y": 2}

    # Again: only what failed.
    stages = [Stage(s.name, 60, writes({"again": 1})) for s in stages]
    records = run(stages, tmp_path)
    again = [name for name, r in records.items() if r["result"] == {"again": 1}]
    assert sorted(again) == ["bad", "silent", "slow"]
    records = run(stages, tmp_path, "--force")
    assert all(r["result"] == {"again": 1} for r in records.values())
    assert records["bad"].get("failed") is None

    capsys.readouterr()
    run(stages, tmp_path, "--force", "--minutes", "0")
    assert capsys.readouterr().out.count("no time is left") == len(stages)


def test_a_part_written_before_a_failure_is_kept(tmp_path):
    code = "import sys; open(sys.argv[1], 'w').write('[1]'); sys.exit(1)"
    records = run([Stage("part", 60, script(code))], tmp_path)
    assert records["part"]["result"] == [1]
    assert records["part"]["failed"] == "exit status 1"


def test_a_model_that_is_gone_is_made_again(tmp_path):
    model = tmp_path / "model"
    code = f"open({str(model)!r}, 'w')"
    stages = [Stage("model", 60, script(code, out=False), needs=model)]
    output = tmp_path / "results"
    assert "failed" not in run(stages, output)["model"]
    model.unlink()
    assert "failed" not in run(stages, output)["model"]
    assert model.exists()


def synthetic(
    tree_ratio: float,
    speed_up: float,
    distinct: float = 1.65,
    index_ratio: float = 1.25,
) -> dict[str, dict]:
    """Records as stages leave them; the numbers are nobody's measurement."""
    shape = {"size": 120, "num_heads": 32, "num_kv_heads": 32}
    attention = []
    for context in (1024, 2048, 4096, 8192):
        for name, us in (("flash_causal", 10.0), ("tree", 10 * tree_ratio)):
            r = {**shape, "context": context, "contender": name, "us": us}
            attention.append({**r, "ratio": us / 10})
    flex = {**shape, "context": 1024, "contender": "flex", "failed": "Error: a|b\nc"}
    us = {"draft": 20.0, "mask": 4.0, "compact": 6.0}
    step = {"sizes": [15, 5, 15], "moved": 4, "parts": {"index": 10.0}}
    steps = [{**step, "context": 1024, "us": us}]
    late = {"draft": 40.0, "mask": 5.0}
    steps += [{**step, "context": c, "us": late} for c in (2048, 4096, 8192)]
    steps += [
        {**step, "context": 32768, "us": late, "parts": {"index": 10 * index_ratio}}
    ]
    turn = {"seconds": 1.0, "request_steps": 250, "tokens": 250}
    row = {"acceptance_length": 1.0, "distinct_trigrams": 0.5, "tokens_per_second": 250}
    speed = {
        "settings": {
            "batch_size": 1,
            "temperature": 0.0,
            "max_tokens": 9,
            "model": "wide",
        },
        "num_prompts": 3,
        "turns": {"plain": [turn], LOOKAHEAD: [{**turn, "seconds": 1.2}]},
        "summary": {
            "plain": {**row, "ratio": 1.0},
            LOOKAHEAD: {**row, "ratio": speed_up},
        },
        "not_run": {"suffix": "not installed"},
    }
    compared = {"differ": 2, "prompts": 64, "first_difference": {}}
    correctness = {
        "settings": {"dtype": "bfloat16", "max_tokens": 96},
        "pairs": {"plain@1 against lookahead@1": compared},
    }
    results = {
        "kernel-tests": {"counts": {"passed": 7, "failed": 1}, "failures": {"t": "x"}},
        "kernel-times": {"flash_attention": 3, "attention": attention, "step": steps},
        "kernel-flex": {"attention": [flex]},
        "engine-correctness": correctness,
        "engine-speed": speed,
        "engine-distinct": {
            **speed,
            "summary": {LOOKAHEAD: {**row, "ratio": distinct}},
        },
    }
    common = {"about": ABOUT, "seconds": 5.0, "command": "python x"}
    records = {stage: {**common, "result": r} for stage, r in results.items()}
    model = "python widen_model.py --source demo/model --output /wide"
    records["model"] = {**common, "command": model}
    return records


def verdicts(records: dict[str, dict]) -> list[str]:
    return [target.verdict for target in targets(records)]


def test_targets():
    good = synthetic(1.2, 1.7)
    assert verdicts(good) == ["met"] * 7
    shares = targets(good)[2].values
    assert shares["1024"] == pytest.approx(100 * 30 / 4000)
    assert shares["8192"] == pytest.approx(100 * 51 / 4000)
    assert targets(good)[4].values[""] == pytest.approx(1.2)
    expected = ["NOT MET", "met", "met", "met", "met", "NOT MET", "met"]
    assert verdicts(synthetic(1.4, 1.5)) == expected
    expected = ["met", "met", "met", "NOT MET", "met", "met", "NOT MET"]
    assert verdicts(synthetic(1.2, 1.7, 1.5, 1.4)) == expected
    assert verdicts({}) == ["not measured"] * 7
    del good["kernel-times"]["result"]["attention"][1]
    assert verdicts(good)[0] == "not measured"


def test_summary():
    records = synthetic(1.4, 1.7)
    records["engine-sampled"] = {
        "about": {**ABOUT, "commit": "def"},
        "seconds": 1.0,
        "command": "python x",
        "failed": "stopped after 1 s",
        "result": None,
    }
    text = build_summary(records, QUESTIONS)
    assert text.startswith("# Some GPU\n")
    assert "1.4x (1024)" in text
    assert "text that does not loop | at least 1.6x | 1.65x | met |" in text
    assert "The compaction moves 4 nodes" in text
    assert "NOT MET" in text
    assert "| engine-sampled | 1 | stopped after 1 s |" in text
    assert "| engine-float32 | 0 | not run |" in text
    assert "different commits: ['abc', 'def']" in text
    assert "small trained Llama (demo/model)" in text
    assert "1 failed, 7 passed" in text
    assert "FAILED t" in text
    assert "failed: Error: a/b" in text
    assert "plain@1 against lookahead@1: 2 of 64 prompts differ" in text
    assert "suffix | not run: not installed" in text
    assert "- What does engine-sampled say? (engine-sampled: stopped after 1 s)" in text
    assert "(engine-speed: suffix not run: not installed)" in text
    assert "say? (kernel-tests" not in text
    assert build_summary({}, QUESTIONS).count("| not run |") == len(STAGES)


def test_what_is_unanswered_comes_last():
    lines = build_summary({}, QUESTIONS).splitlines()
    expected = [f"- {q} ({name}: not run)" for name, q in QUESTIONS.items()]
    assert lines[-len(STAGES) :] == expected
    records = {name: {"about": ABOUT, "seconds": 1, "command": ""} for name in STAGES}
    records["model"]["command"] = "x --source a --output b"
    text = build_summary(records, QUESTIONS)
    assert text.endswith("Every question was answered.\n")


def test_summary_of_starts_steps_and_sizes():
    row = {"step_ms": 10.0, "tokens_per_step": 1.0, "tokens_per_second": 100.0}
    plain = {**row, "server": "plain", "tree": "plain", "nodes": 1}
    tree = {**row, "server": "15/5/15", "tree": "4/5/0", "nodes": 16, "step_ms": 12.0}
    tree |= {"graph": 30, "tokens_per_second": 150.0}
    said = {"attention": ["FLASH_ATTN attention backend"], "graphs": ["Graphs took 1"]}
    results = {
        "engine-start": {
            "engines": {
                "plain": {"seconds_to_start": 30.0, **said},
                "lookahead": {"failed": "ValueError: no room", "log": []},
            }
        },
        "step-cost": {"rows": [r | {"context": 1024} for r in (plain, tree)]},
        "engine-sizes": {"rows": [r | {"context": 0} for r in (plain, tree)]},
        "kernel-tiles": {
            "sweep": [
                {"size": 120, "context": 1024, "us": us, "config": {"tile": us}}
                for us in (3.0, 2.0)
            ]
        },
    }
    common = {"about": ABOUT, "seconds": 5.0, "command": "python x"}
    records = {stage: {**common, "result": r} for stage, r in results.items()}
    text = build_summary(records, QUESTIONS)
    assert "plain started in 30 s: FLASH_ATTN attention backend, Graphs took 1" in text
    assert "lookahead DID NOT RUN: ValueError: no room" in text
    assert "| 1024 | 16 | 30 | 4/5/0 | 15/5/15 | 12.00 | 1.20x |" in text
    assert "| 4/5/0 | 16 | 150.0 | 1.50x | 12.00 | 1.00 |" in text
    assert "T=120, context 1024: {'tile': 2.0}, 2.0 us" in text


def test_summary_of_a_given_model():
    records = synthetic(1.2, 1.7)
    del records["model"]
    assert "the folder `wide`" in build_summary(records, QUESTIONS)


def test_compared_outputs():
    same = [[1, 2], [3]]
    assert engine_correctness.compare(same, same)["differ"] == 0
    other = engine_correctness.compare(same, [[1, 9], [3, 4]])
    assert other == {"differ": 2, "prompts": 2, "first_difference": {0: 1, 1: 1}}


def test_beginnings():
    texts = engine_correctness.beginnings(["abcdefgh", "x"])
    assert texts == ["abcdefgh", "x", "abcdef", "abcd", "ab"]
