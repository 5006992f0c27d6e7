# SPDX-License-Identifier: Apache-2.0
"""When the runner does what, around vLLM's own steps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tests.harness.engines import Engines
from tests.harness.jobs import (
    ACCEPTED,
    SMALL,
    prompts,
    request,
    same_as_plain,
    same_outputs,
)
from vllm_lookahead.engine.v2 import model_runner, outputs
from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner
from vllm_lookahead.engine.v2.trees import StepTrees
from vllm_lookahead.params import LookaheadParams


class Recorder:
    """Takes down what is called of it."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append(name)


@pytest.fixture
def runner() -> Any:
    runner = object.__new__(LookaheadModelRunner)
    runner.step = StepTrees(4, 64, LookaheadParams(3, 3, 3), torch.device("cpu"))
    return runner


@pytest.mark.parametrize("name", ["capture_model", "prepare_dummy_attn"])
def test_dummy_batches_read_no_tree(
    name: str, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upstream(self: Any, *args: Any) -> tuple[int, int]:
        return self.step.attended, int(self.step.position.abs().sum())

    monkeypatch.setattr(model_runner.BaseModelRunner, name, upstream)
    runner.step.attended = 3
    runner.step.position.fill_(1000)
    assert getattr(runner, name)() == (0, 0)


def test_the_output_does_not_wait_for_the_next_trees(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was drafted is on its way before the step is sampled, let alone drafted."""
    calls: list[str] = []
    step = runner.step
    step.longest[:] = torch.tensor([2, 0, 1, 9])
    step.plan = SimpleNamespace(num_trees=3, batch=lambda *args: None)
    runner.ops = runner.main_stream = Recorder(calls)
    runner.output_copy_stream = Recorder(calls)
    tables = [torch.zeros(4, 1, dtype=torch.int32)]
    runner.block_tables = SimpleNamespace(input_block_tables=tables)
    runner.page_group, runner.page_kept = 0, math.inf
    runner.slot_views = [torch.zeros(1, 16, 1)]
    runner.pages = SimpleNamespace(block_size=16)
    result = SimpleNamespace(num_sampled=None, num_rejected=None)

    def sample(*args: Any) -> tuple[Any, Any]:
        calls.append("sample")
        return result, None, None

    def upstream(self: Any, grammar_output: Any) -> Any:
        batch: Any = SimpleNamespace(req_ids=["a", "b", "c", "d"])
        self.sample(None, batch, grammar_output)
        calls.append("propose")
        step.longest.zero_()  # the next step
        return SimpleNamespace(get_output=lambda: "output")

    runner.tree_sampler = SimpleNamespace(sample=sample)
    runner.speculator, runner.trimmer = SimpleNamespace(chances=None), None
    monkeypatch.setattr(model_runner.BaseModelRunner, "sample_tokens", upstream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    wrap = SimpleNamespace(wrap=lambda output, drafted, **more: (output, drafted))
    monkeypatch.setattr(outputs, "LookaheadModelRunnerOutput", wrap)
    output = runner.sample_tokens(None)
    assert calls == [
        *("wait_stream", "sample", "compact"),
        *("update", "keep_answers", "propose"),
    ]
    assert output.get_output() == ("output", {"a": 2, "b": 0, "c": 1})

    step.plan.num_trees = 0
    monkeypatch.setattr(
        model_runner.BaseModelRunner, "sample_tokens", lambda *args: "plain"
    )
    assert runner.sample_tokens(None) == "plain"


def test_tokens_of_all_requests_stay_with_the_host(engines: Engines) -> None:
    """On the device they would take 512 MiB at 1,024 requests of 131,072 tokens."""
    result = engines.run([[request([5, 6, 7], max_tokens=2)]], SMALL)
    assert result["dense"] == [False]


@pytest.mark.parametrize("budget", [8, 17])
def test_trees_narrower_than_n(engines: Engines, budget: int) -> None:
    """Of four requests, which share the step with prefills and with one another."""
    texts = [(p * 9)[: 9 + i] for i, p in enumerate(prompts(5, seed=40, longest=4))]
    lengths = (8, 14, 12, 16, 6)
    batch = [request(t, max_tokens=n) for t, n in zip(texts, lengths, strict=True)]
    batch[1]["params"]["extra_args"] = {"lookahead_ngram_size": 3}
    sizes = {"window_size": 3, "ngram_size": 5, "verification_set_size": 3}
    result = same_as_plain(engines, [batch], sizes, max_num_batched_tokens=budget)
    assert result["metrics"][ACCEPTED] > 5


def test_vllms_warm_up(engines: Engines) -> None:
    """Prefills with a grammar, then trees, as before graphs are captured."""
    jobs = [[request(p) for p in prompts(3, seed=41)]]
    result = engines.run(jobs, SMALL, warm_up=True)
    assert result["metrics"][ACCEPTED] > 0
    same_outputs(engines.run(jobs), result)
