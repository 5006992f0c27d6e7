# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark runs, on shapes small enough for the interpreter."""

import json

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks.gpu import kernels, step_kernels
from vllm_lookahead.params import LookaheadParams


def test_smoke(tmp_path, capsys):
    out, plot = tmp_path / "kernels.json", tmp_path / "kernels.png"
    kernels.main(["--smoke", "--out", str(out), "--plot", str(plot)])
    results = json.loads(out.read_text())
    by_name = {r["contender"]: r for r in results["attention"]}
    assert by_name["tree"]["max_error"] < 2e-2
    assert by_name["tree"]["us"] > 0
    assert list(by_name) == list(kernels.CONTENDERS)
    assert all("failed" not in r for r in by_name.values())
    ops = {"write_tokens", "draft", "mask", "verify", "compact", "update"}
    ops |= {"likeliest_tokens", "keep_answers", "feed", "store", "gather"}
    (step,) = results["step"]
    assert set(step["us"]) == ops
    assert set(step["parts"]) == {"index"}
    assert step["moved"] > 0
    assert plot.exists() or "matplotlib" in capsys.readouterr().out


def test_what_is_there_is_not_timed_again(tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    options = ["--smoke", "--resume", "--out", str(out), "--contenders", "tree"]
    kernels.main(options)
    before = json.loads(out.read_text())
    assert len(before["attention"]) == len(before["step"]) == 1
    timed = []
    monkeypatch.setattr(kernels, "microseconds", lambda calls: timed.append(1) or 1.0)
    kernels.main(options)
    assert not timed
    assert json.loads(out.read_text()) == before
    del before["attention"]
    out.write_text(json.dumps(before))
    kernels.main(options)
    assert len(timed) == 1


@pytest.mark.parametrize("sizes", kernels.STEP_SIZES)
def test_compaction_moves_what_a_step_accepts(sizes):
    """The branch of which most must move: the first nodes of a tree stay put."""
    params = LookaheadParams(*sizes)
    torch.manual_seed(0)
    caches = [torch.zeros(80, 16, 2, 8, dtype=torch.bfloat16)]
    calls, _, moved = step_kernels.step_calls(params, 1, 640, 640, 16, caches, "cpu")
    assert 2 <= moved < params.ngram_size
    before = caches[0].normal_().clone()
    calls["compact"]()
    slots_changed = (caches[0] != before).flatten(2).any(-1).sum()
    assert slots_changed == moved


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    shape = {"num_heads": 32, "num_kv_heads": 8, "contender": "tree"}
    results = [
        {**shape, "size": t, "context": c, "us": c} for t in (5, 9) for c in (1, 2)
    ]
    kernels.plot(results, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_run_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "no GPU" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        kernels.main(["--help"])
    assert not done.value.code
    assert "--contexts" in capsys.readouterr().out


def test_ratios():
    shape = {"size": 120, "context": 1024, "num_heads": 32, "num_kv_heads": 32}
    results = [
        {**shape, "contender": "tree", "us": 12.0},
        {**shape, "contender": kernels.YARDSTICK, "us": 10.0},
        {**shape, "contender": "flex", "skipped": "not here"},
    ]
    kernels.add_ratios(results)
    assert results[0]["ratio"] == 1.2
    assert "ratio" not in results[2]
