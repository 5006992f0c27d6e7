# SPDX-License-Identifier: Apache-2.0
"""benchmarks/offline.py when an engine dies while it is measured."""

import argparse
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


class FakeEngine:
    """Answers as often as it is told to, then dies."""

    def __init__(self, lives: int) -> None:
        self.lives, self.closed = lives, False

    def run(self, job):
        self.lives -= 1
        if self.lives < 0:
            raise RuntimeError("the engine died:\nout of memory")
        steps = [[[1], [2]] for _ in job["prompts"]]
        times = [[0.0, 1.0] for _ in job["prompts"]]
        more = {"steps": steps, "times": times, "peak_memory_mib": 1.0}
        return {"seconds": 2.0, **more}

    def close(self):
        self.closed = True


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "offline.py"))


@pytest.mark.parametrize("lives", range(3))
def test_the_others_go_on(offline, lives):
    """It dies in the warm-up, in the first turn, or in the second."""
    engines = {"plain": FakeEngine(9), "ngram": FakeEngine(lives)}
    dying = engines["ngram"]
    args = argparse.Namespace(
        data_dir=None, chat=False, num_prompts=2, max_tokens=2, batch_size=1, repeats=2
    )
    args.seed, args.min_distinct, args.json_schema = 0, 0.0, None
    cell = offline["Cell"](str(BENCHMARKS / "python_prompts.jsonl"), 0.0)
    saved, not_run = [], {}
    turns = offline["measure"](
        args, cell, engines, not_run, lambda turns, n: saved.append(len(turns))
    )
    assert not_run == {"ngram": "the engine died:\nout of memory"}
    assert dying.closed
    assert list(turns) == list(engines) == ["plain"]
    assert saved == ([2, 1] if lives == 2 else [1, 1])
    assert offline["summarize"](turns)["plain"]["ratio"] == 1
