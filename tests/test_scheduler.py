# SPDX-License-Identifier: Apache-2.0
"""The scheduler alone: what a step's trees leave to prefills, and what they hold."""

import random
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.models import registry

from tests.hf_config import write_config
from tests.scheduling import BATCHED, BLOCK, OFF, Driver, N, T
from vllm_lookahead.engine import support
from vllm_lookahead.engine.shares import nodes_within, tree_share


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    model = write_config(tmp_path, max_position_embeddings=65536)
    return lambda worker=support.V2_WORKER, **sizes: Driver(model, worker, **sizes)


@pytest.mark.parametrize("count", [1, 2, 5, 60, 200])
def test_a_prefill_beside_trees(make: Any, count: int) -> None:
    """It has all that whole trees do not take, and half of what they could share."""
    driver = make()
    ids = driver.add(20, count)
    driver.step()
    (long,) = driver.add(20000)
    output = driver.step()
    assert output.num_scheduled_tokens.keys() == {*ids, long}
    nodes = min(T, BATCHED // count)
    left = BATCHED - N * count
    kept = min((nodes - N) * count, left // 2)
    assert output.num_scheduled_tokens[long] == left - kept
    assert {output.num_scheduled_tokens[name] for name in ids} == {N}
    fed = output.max_nodes.values()
    assert output.best_nodes is None and set(output.max_nodes) == set(ids)
    assert min(fed) > N and sum(fed) <= N * count + kept
    assert kept == left // 2 or set(fed) == {nodes}


@pytest.mark.parametrize(
    ("extra", "nodes"), [(OFF, 1), ({"lookahead_ngram_size": 2}, 30)]
)
def test_two_hundred_requests(make: Any, extra: dict[str, int], nodes: int) -> None:
    """All of them run in every step, and hold what they use."""
    driver = make()
    ids = driver.add(20, 200, **extra)
    for _ in range(3):
        assert driver.step().num_scheduled_tokens.keys() == set(ids)
    p = 21  # in the third step
    assert {driver.blocks(name) for name in ids} == {-(-(p + nodes) // BLOCK)}
    if extra == OFF:
        driver.add(20000)
        assert driver.step().total_num_scheduled_tokens == BATCHED


def test_slots_of_trees(make: Any) -> None:
    """T of them for a request that is fed a tree, and no more for any other."""
    driver = make()
    (off,), (on,), (long,) = driver.add(20, **OFF), driver.add(20), driver.add(9000)
    driver.step()
    assert [driver.blocks(name) for name in (off, on)] == [2, 2]
    output = driver.step()
    assert output.scheduled_spec_decode_tokens.keys() == {on}
    p = 20
    assert [driver.blocks(name) for name in (off, on)] == [2, -(-(p + T) // BLOCK)]
    assert driver.blocks(long) == -(-9000 // BLOCK)


def test_small_trees_leave_more(make: Any) -> None:
    driver = make()
    small = driver.add(
        20, 3, lookahead_window_size=0, lookahead_verification_set_size=1
    )
    (large,) = driver.add(20)
    driver.step()
    output = driver.step()
    assert output.max_nodes == dict.fromkeys(small, N) | {large: T}
    assert driver.blocks(large) == -(-(20 + T) // BLOCK)
    assert {driver.blocks(name) for name in small} == {2}


def test_trees_leave_half_of_a_small_budget(make: Any) -> None:
    driver = make(support.V1_WORKER)
    ids = driver.add(20, 200)
    driver.step()
    (long,) = driver.add(20000)
    output = driver.step()
    # They share the other half evenly.
    fed = list(output.max_nodes.values())
    assert min(fed) > N and max(fed) - min(fed) <= 1
    assert sum(fed) + output.num_scheduled_tokens[long] <= BATCHED
    assert {output.num_scheduled_tokens[name] for name in ids} == {N}
    assert output.num_scheduled_tokens[long] == (BATCHED - 200 * N) // 2


def test_shares_fit_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        count = draw.randint(1, 256)
        sizes = [draw.choice([2, 5, 8, 24, T]) for _ in range(count)]
        share = tree_share(sizes, 256)
        fed = [nodes_within(size, min(size, 61), share) for size in sizes]
        assert sum(fed) <= 256


def test_fewer_placeholders_mean_a_smaller_tree(make: Any) -> None:
    """At the end of the model's length vLLM cuts them: no more tokens may come out."""
    driver = make()
    (one,) = driver.add(20)
    driver.step()
    output = driver.step()
    assert output.max_nodes == {one: T}
    output.scheduled_spec_decode_tokens[one] = [-1]
    assert driver.scheduler.max_nodes(output) == {one: 2}
