# SPDX-License-Identifier: Apache-2.0
"""How many rows of logits a step may have: buffers and profiling count on it."""

import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.models import registry

from tests.hf_config import write_config
from tests.scheduling import BATCHED, OFF, Driver
from vllm_lookahead.engine.support import V2_WORKER
from vllm_lookahead.engine.v2 import model_runner
from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner
from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.engine.v2.trees import Plan, StepTrees
from vllm_lookahead.params import LookaheadParams

MOST = 256
CPU = torch.device("cpu")


class Server:
    """A scheduler, and what a runner makes of its output."""

    def __init__(self, params: LookaheadParams, folder: Path) -> None:
        model = write_config(folder, max_position_embeddings=65536)
        self.driver = Driver(model, V2_WORKER, **asdict(params))
        self.sizes = RequestSizes(MOST, params)
        self.slots: dict[str, int] = {}
        self.step = StepTrees(MOST, BATCHED, params, CPU)
        self.runner: Any = SimpleNamespace(
            req_states=SimpleNamespace(req_id_to_index=self.slots),
            sizes=self.sizes,
            lookahead=params,
            max_num_tokens=BATCHED,
            max_model_len=65536,
            trimmer=None,
        )

    def add(self, count: int, chain: bool = False, **extra: int) -> None:
        for name in self.driver.add(20, count, **extra):
            slot = self.slots[name] = len(self.slots)
            sampling = self.driver.scheduler.requests[name].sampling_params
            self.sizes.add_request(slot, sampling, chain)

    def rows(self) -> int:
        """Logits rows of the next step."""
        output = self.driver.step()
        if output.scheduled_spec_decode_tokens:
            output = LookaheadModelRunner.widen(self.runner, output)
        drafts, num_tokens = (
            output.scheduled_spec_decode_tokens,
            output.num_scheduled_tokens,
        )
        names = sorted(num_tokens, key=lambda name: name not in drafts)
        batch: Any = SimpleNamespace(
            num_reqs=len(names),
            num_draft_tokens_per_req=np.array([len(drafts.get(n, ())) for n in names]),
            idx_mapping_np=np.array([self.slots[name] for name in names]),
            num_scheduled_tokens=np.array([num_tokens[name] for name in names]),
        )
        return int(Plan.make(batch, self.sizes, CPU).cu_window_np[-1])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())


SERVERS = [(15, 5, 15), (4, 2, 3), (0, 8, 1), (45, 7, 40)]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("sizes", SERVERS)
def test_random_batches(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    params = LookaheadParams(*sizes)
    server, draw = Server(params, tmp_path), random.Random(sum(sizes))
    while len(server.slots) < MOST:
        count = min(draw.randint(1, 9), MOST - len(server.slots))
        own = {
            "lookahead_window_size": draw.randint(0, params.window_size),
            "lookahead_ngram_size": draw.randint(2, params.ngram_size),
            "lookahead_verification_set_size": draw.randint(0, sizes[2]),
        }
        extra = draw.choice([{}, {}, OFF, own, dict(draw.sample([*own.items()], 1))])
        server.add(count, chain=draw.random() < 0.2, **extra)
        for _ in range(2):
            assert server.rows() <= server.step.max_rows


@pytest.mark.usefixtures("here")
def test_the_bound_is_met(tmp_path: Path) -> None:
    """Trees of a root and one more node, whose root refills the window as well."""
    server = Server(LookaheadParams(1, 2, 1), tmp_path)
    server.add(MOST)
    server.rows()
    assert server.rows() == server.step.max_rows == 3 * MOST
    full = LookaheadParams(15, 5, 15)
    assert StepTrees(1024, BATCHED, full, CPU).max_rows == 1024 + BATCHED
    assert StepTrees(1, BATCHED, full, CPU).max_rows == 76


@pytest.mark.parametrize(("chunk", "rows"), [(16384, 9216), (1000, 1000), (1, 76)])
def test_memory_is_profiled_with_as_many(
    chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def compute_logits(hidden_states: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_states))
        return hidden_states

    name = "_dummy_sampler_run"
    monkeypatch.setattr(model_runner.BaseModelRunner, name, lambda *args: None)
    runner: Any = object.__new__(LookaheadModelRunner)
    runner.device, runner.tree_sampler = CPU, SimpleNamespace(max_chunk_rows=chunk)
    runner.step = StepTrees(1024, BATCHED, LookaheadParams(15, 5, 15), CPU)
    runner.model = SimpleNamespace(compute_logits=compute_logits)
    runner._dummy_sampler_run(torch.zeros(3, 2))
    assert seen == [rows]
