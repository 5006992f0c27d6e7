# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step is fed: the choice, and what the scheduler makes of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.model_executor.models import registry

from tests.hf_config import write_config
from tests.scheduling import BATCHED, BLOCK, Driver
from vllm_lookahead.engine import config
from vllm_lookahead.engine.forest import Forest
from vllm_lookahead.engine.support import V2_WORKER

N, T = config.GPU_DEFAULTS.ngram_size, config.GPU_DEFAULTS.max_tree_size
FLAT = [(1, 5.0), (BATCHED, 5.0)]
STEEP = [(n, 5.0 + 0.02 * n) for n in range(1, 2049)]


def forest(times: Any = None) -> Forest:
    found = Forest(4, 64, 3)
    rows = [[0.9, 0.5, 0.1], [0.0, 0.0, 0.0], [0.8, 0.4, 0.2]]
    found.learn_chances(["a", None, "c"], np.array(rows, dtype=np.float32))
    if times:
        found.learn_times(times, 0)
    return found


def test_nodes_of_all_requests_are_ranked() -> None:
    """Of one that is not known, as of the mean of those that are."""
    most = [("a", 3), ("c", 1), ("new", 2)]
    expected = [0.9, 0.85, 0.8, 0.5, 0.45, 0.1]
    assert forest().ranked(most).tolist() == pytest.approx(expected)
    assert forest().ranked([]).tolist() == []


def test_the_most_tokens_a_second() -> None:
    """Against a loop over all numbers of nodes."""
    chances = np.array([0.9, 0.8, 0.5, 0.4, 0.2, 0.1], dtype=np.float32)
    assert forest().best(chances, 2, 2) == 6  # nothing was measured
    assert forest([(1, 1.0), (64, 1.0)]).best(chances, 2, 2) == 6
    for slope in (0.02, 0.1, 0.2, 0.3, 2.0):
        times = [(n, 1.0 + slope * n) for n in range(1, 64)]
        speeds = [(2 + sum(chances[:n])) / (1 + slope * (2 + n)) for n in range(7)]
        assert forest(times).best(chances, 2, 2) == int(np.argmax(speeds))
    # To the end of a graph nodes are free.
    assert forest([(4, 1.0), (16, 9.0)]).best(chances, 2, 2) == 2


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    """A server that picks its sizes as on a GPU."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    picked = config.GPU_DEFAULTS
    monkeypatch.setattr(config, "default_params", lambda device_type: picked)
    model = write_config(tmp_path, max_position_embeddings=65536)
    return Driver(model, V2_WORKER, picked=True)


def draft(driver: Driver, ids: list[str], times: Any, chance: float = 0.9) -> None:
    """What a step's output would tell the scheduler."""
    known = driver.scheduler.forest
    assert known is not None
    falling = chance ** np.arange(1, T, dtype=np.float32)
    known.learn_chances(ids, np.tile(falling, (len(ids), 1)))
    known.learn_times(times, 0)


def fed(output: Any) -> int:
    """Tokens of a step, as the worker counts them."""
    narrow = sum(map(len, output.scheduled_spec_decode_tokens.values()))
    best = output.best_nodes
    if best is None:
        best = sum(output.max_nodes.values()) - len(output.max_nodes)
    return output.total_num_scheduled_tokens - narrow + best


@pytest.mark.parametrize("count", [1, 8, 60, 200])
def test_free_nodes_are_all_fed(driver: Driver, count: int) -> None:
    """And beside a prefill, which has half of what they could share."""
    ids = driver.add(20, count)
    driver.step()
    draft(driver, ids, FLAT)
    output = driver.step()
    assert output.max_nodes == dict.fromkeys(ids, T)
    assert output.best_nodes == min((T - 1) * count, BATCHED - count)
    draft(driver, ids, FLAT)
    (long,) = driver.add(20000)
    output = driver.step()
    assert output.num_scheduled_tokens[long] >= (BATCHED - N * count) // 2
    assert output.best_nodes >= min((T - 1) * count, BATCHED // 4)
    assert fed(output) <= BATCHED


@pytest.mark.parametrize("count", [1, 8, 60, 200])
def test_costly_nodes_are_few(driver: Driver, count: int) -> None:
    """Any request may have any of them, K/V slots included."""
    ids = driver.add(20, count)
    driver.step()
    draft(driver, ids, STEEP, chance=0.7)
    output = driver.step()
    best = output.best_nodes
    # The first node of each tree pays, the last ones do not.
    assert count <= best < (T - 1) * count
    most = min(T, 1 + best)
    assert output.max_nodes == dict.fromkeys(ids, most)
    assert {driver.blocks(name) for name in ids} == {-(-(20 + most) // BLOCK)}
    # No node pays: nothing is drafted, and what waits is read sooner.
    draft(driver, ids, STEEP, chance=0.001)
    (long,) = driver.add(20000)
    output = driver.step()
    assert output.best_nodes is None and not output.max_nodes
    assert output.num_scheduled_tokens[long] == BATCHED - count


@pytest.mark.parametrize("who", ["lora", "grammar"])
def test_beside_what_the_host_must_count(driver: Driver, who: str) -> None:
    """Trees are cut alike, to as many nodes in all."""
    ids = driver.add(20, 8)
    driver.step()
    draft(driver, ids, STEEP, chance=0.7)
    output = driver.step()
    best = output.best_nodes
    if who == "lora":
        driver.scheduler.lora_config = SimpleNamespace()
    output.has_structured_output_requests = who == "grammar"
    most, cut = driver.scheduler.share_nodes(output)
    assert cut is None and len(set(most.values())) == 1
    assert best < sum(most.values()) <= len(ids) + best


def test_a_budget_that_is_given_is_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, ranks in (
        ({}, True),
        ({"ngram_size": 5}, True),
        ({"node_budget": 8}, False),
        ({"verification_set_size": 4}, True),
        ({"window_size": 0}, True),
        ({"window_size": 4}, False),
    ):
        assert config.LookaheadConfig.from_options(options).ranks_nodes is ranks
