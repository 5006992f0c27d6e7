# SPDX-License-Identifier: Apache-2.0
"""Which requests the step's cost is taken of, and how, without a GPU."""

import argparse
import json

import pytest

from benchmarks.gpu import stages, step_cost
from benchmarks.gpu.run_all import ROOT

MODEL = str(ROOT / "demo" / "model")


def test_trees_have_the_sizes_asked_for():
    def nodes(trees):
        return [step_cost.params_of(tree).max_tree_size for tree in trees]

    assert nodes(stages.TREES) == [8, 16, 32, 64, 120]
    assert nodes(stages.OWN_TREES) == [8, 16, 32, 64]


def test_requests_of_a_server():
    assert step_cost.requests("plain", ["2/5/0"]) == {"plain": None}
    found = step_cost.requests("15/5/15", [*stages.TREES, "16/5/0"])
    assert list(found) == ["off", *stages.TREES]
    assert found["off"] == {"lookahead": 0}
    assert found["15/5/1"] == {
        "lookahead_window_size": 15,
        "lookahead_ngram_size": 5,
        "lookahead_verification_set_size": 1,
    }
    assert list(step_cost.requests("4/5/0", ["2/5/0"])) == ["off", "2/5/0", "4/5/0"]
    with pytest.raises(SystemExit, match="2/5: sizes are three whole numbers"):
        step_cost.requests("15/5/15", ["2/5"])


def test_graphs_hold_trees():
    pytest.importorskip("vllm")
    assert step_cost.computed("15/5/15", 120) == 120
    assert 64 <= step_cost.computed("15/5/15", 64) <= 120
    for tree in stages.OWN_TREES:
        nodes = step_cost.params_of(tree).max_tree_size
        assert step_cost.computed(tree, nodes) == nodes


def test_prompts_have_so_many_tokens():
    options = ["--model", MODEL, "--contexts", "700", "--num-prompts", "3"]
    args = step_cost.parse([*options, "--out", "x", "--max-model-len", "8448"])
    prompts = [p["prompt_token_ids"] for p in step_cost.prompts(args, 700)]
    assert [len(p) for p in prompts] == [700] * 3
    assert len({tuple(p[:20]) for p in prompts}) == 3
    longest = step_cost.prompts(args, 8192)
    assert len(longest[0]["prompt_token_ids"]) == 8192
    assert all(isinstance(p, str) for p in step_cost.prompts(args, 0))


def test_a_context_that_does_not_fit(capsys):
    options = ["--model", MODEL, "--out", "x", "--contexts", "1000"]
    with pytest.raises(SystemExit):
        step_cost.parse([*options, "--max-model-len", "1024"])
    assert "--contexts 1000: with --max-tokens 96" in capsys.readouterr().err


class FakeEngine:
    """Takes 30 ms to read a prompt, 2 ms a step, and 4 ms with a tree."""

    def __init__(self, options, log, start_limit):
        assert options["hf_overrides"] == {"max_position_embeddings": 1024}

    def run(self, job):
        extra = job["params"][0]["extra_args"]
        slow = bool(extra) and extra.get("lookahead") != 0
        ms, tokens = (4, [5, 6]) if slow else (2, [5])
        times = [(30 + ms * i) / 1e3 for i in range(5)]
        steps = [[1], *[tokens] * 4]
        return {"times": [times], "steps": [steps], "seconds": times[-1]}

    def close(self):
        pass


def test_a_prefill_is_not_in_a_steps_time(monkeypatch, tmp_path):
    monkeypatch.setattr(step_cost, "EngineProcess", FakeEngine)
    monkeypatch.setattr(step_cost, "computed", lambda server, nodes: 120)
    out = tmp_path / "out.json"
    options = ["--model", MODEL, "--out", str(out), "--resume", "--servers", "plain"]
    step_cost.main(options)
    (plain,) = json.loads(out.read_text())["rows"]
    assert plain["step_ms"] == pytest.approx(2)
    monkeypatch.setattr(FakeEngine, "close", lambda self: pytest.fail("it is there"))
    step_cost.main(options)
    monkeypatch.undo()
    monkeypatch.setattr(step_cost, "EngineProcess", FakeEngine)
    monkeypatch.setattr(step_cost, "computed", lambda server, nodes: 120)
    step_cost.main([*options, "15/5/15"])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["tree"], r["nodes"], r.get("graph")) for r in rows] == [
        ("plain", 1, None),
        ("off", 1, None),
        ("15/5/15", 120, 120),
    ]
    assert [r["step_ms"] for r in rows] == pytest.approx([2, 2, 4])
    assert [r["tokens_per_step"] for r in rows] == [1, 1, 2]


def test_an_empty_data_set(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("")
    args = argparse.Namespace(dataset=str(path), data_dir=None, num_prompts=1)
    with pytest.raises(SystemExit, match="it is empty"):
        step_cost.prompts(args, 10)
