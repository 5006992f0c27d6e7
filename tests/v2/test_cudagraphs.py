# SPDX-License-Identifier: Apache-2.0
"""Which graph a step would replay. Nothing is captured: that takes a GPU."""

import random
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.models import registry
from vllm.v1.worker.gpu import cudagraph_utils

from tests.hf_config import write_config
from tests.scheduling import BATCHED, BLOCK, OFF, SIZES, Driver
from vllm_lookahead.engine.support import V2_WORKER
from vllm_lookahead.engine.v2.cudagraph import (
    PADDING,
    REQUESTS,
    LookaheadCudaGraphManager,
)
from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner
from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.params import LookaheadParams

FULL = LookaheadParams(**SIZES)
T = FULL.max_tree_size
LARGEST = 512  # tokens of vLLM's largest graph
WIDE = [LookaheadParams(30, 7, 20), LookaheadParams(45, 7, 40)]  # T: 300, 510
PARAMS = [FULL, LookaheadParams(5, 5, 5), LookaheadParams(0, 8, 1)]


def make_manager(
    monkeypatch: pytest.MonkeyPatch,
    params: LookaheadParams = FULL,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    largest: int = LARGEST,
) -> Any:
    one = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: one)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[
                n
                for n in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
                if n <= largest
            ],
            max_cudagraph_capture_size=largest,
        ),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    manager = LookaheadCudaGraphManager(
        config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, params=params
    )
    manager._graphs_captured = True
    return manager


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    return make_manager(monkeypatch)


def dispatch(manager: Any, widths: list[int]) -> Any:
    """As the model runner does for a step without a prefill."""
    most, count, num_tokens = max(widths), len(widths), sum(widths)
    uniform = most if most * count == num_tokens else None
    return manager.dispatch(count, num_tokens, uniform, 0, max_query_len=most)


def fits(desc: Any, widths: list[int]) -> bool:
    """Whether a full graph pads a batch with a third of it at most."""
    real = sum(widths)
    return (
        desc.cg_mode == CUDAGraphMode.FULL
        and desc.max_query_len >= max(widths)
        and real <= desc.num_tokens <= max(4 / 3 * real, real + PADDING)
        and desc.num_reqs >= len(widths)
    )


def tree_graphs(manager: Any) -> list[Any]:
    full = manager._capture_descs[CUDAGraphMode.FULL]
    return [desc for desc in full if desc.max_query_len]


def test_batches_of_the_scheduler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Scheduler, runner and graphs agree, from one request to as many as may run."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    most = 24
    manager = make_manager(monkeypatch, max_num_seqs=most)
    driver = Driver(write_config(tmp_path, max_position_embeddings=65536), V2_WORKER)
    sizes = RequestSizes(most, FULL)
    slots: dict[str, int] = {}
    runner: Any = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index=slots),
        sizes=sizes,
        lookahead=FULL,
        max_num_tokens=8192,
        max_model_len=65536,
        trimmer=None,
    )
    for count in range(1, most + 1):
        extra = OFF if count % 3 == 0 else {"lookahead_node_budget": 31}
        (name,) = driver.add(20, **extra)
        slots[name] = count - 1
        params = driver.scheduler.requests[name].sampling_params
        sizes.add_request(count - 1, params, chain=False)
        driver.step()
        output = LookaheadModelRunner.widen(runner, driver.step())
        off = count // 3
        widths = [31] * (count - off) + [1] * off
        assert sorted(output.num_scheduled_tokens.values()) == sorted(widths)
        assert output.total_num_scheduled_tokens == sum(widths)
        assert fits(dispatch(manager, widths), widths)


@pytest.mark.parametrize("params", WIDE)
def test_a_tree_wider_than_the_largest_graph(
    params: LookaheadParams, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One request is fed all of it, window and all."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    model = write_config(tmp_path, max_position_embeddings=65536)
    driver, tree = Driver(model, V2_WORKER, **asdict(params)), params.max_tree_size
    sizes = RequestSizes(4, params)
    (name,) = driver.add(20)
    sizes.add_request(0, driver.scheduler.requests[name].sampling_params, chain=False)
    runner: Any = SimpleNamespace(
        req_states=SimpleNamespace(req_id_to_index={name: 0}),
        sizes=sizes,
        lookahead=params,
        max_num_tokens=BATCHED,
        max_model_len=65536,
        trimmer=None,
    )
    driver.step()
    output = driver.step()
    widths = list(
        LookaheadModelRunner.widen(runner, output).num_scheduled_tokens.values()
    )
    assert widths == [tree]
    assert driver.blocks(name) == -(-(20 + tree) // BLOCK)
    for most, largest in ((BATCHED, LARGEST), (tree, LARGEST), (BATCHED, 256)):
        manager = make_manager(monkeypatch, params, 4, most, largest)
        desc = dispatch(manager, widths)
        assert (desc.num_tokens, desc.num_reqs) == (tree, 1)
        assert desc.cg_mode == CUDAGraphMode.FULL
    full = make_manager(monkeypatch, params, 4, tree - 1)._capture_descs
    assert max(desc.num_tokens for desc in full[CUDAGraphMode.FULL]) < tree


@pytest.mark.parametrize("params", [*PARAMS, *WIDE])
@pytest.mark.parametrize("max_num_seqs", [1, 2, 16, 48, 256, 1024])
def test_any_mix_of_trees(
    params: LookaheadParams, max_num_seqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranking of nodes makes them, whole trees and single tokens among them."""
    manager = make_manager(monkeypatch, params, max_num_seqs)
    draw, t = random.Random(max_num_seqs), params.max_tree_size
    for _ in range(1500):
        count = draw.randint(1, min(max_num_seqs, max(REQUESTS)))
        widths = [1] * count
        for b in range(count):
            room = LARGEST - sum(widths)
            widths[b] += min(draw.choice([0, draw.randrange(t), t - 1]), max(room, 0))
        if max(widths) > 1:
            desc = dispatch(manager, widths)
            assert fits(desc, widths)
            # Attention splits contexts by how many requests there may be.
            most = next((n for n in REQUESTS if n >= count), count)
            assert desc.num_reqs == min(most, desc.num_tokens, max_num_seqs)


def test_more_than_a_graph_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their trees have vLLM's graphs, or none: ours would be mostly idle programs."""
    manager = make_manager(monkeypatch, FULL, 1024)
    assert tree_graphs(manager) == tree_graphs(make_manager(monkeypatch, FULL, 256))
    for widths in ([2] * 200 + [1] * 57, [2] + [1] * 300):
        assert dispatch(manager, widths).cg_mode.name == "PIECEWISE"
    for widths in ([T] * 5, [2] + [1] * 800):
        assert dispatch(manager, widths).cg_mode.name == "NONE"
    desc = manager.dispatch(400, 400, 1, 0, max_query_len=1)  # of one token each
    assert (desc.cg_mode.name, desc.uniform_token_count) == ("FULL", 1)


def test_without_trees(manager: Any) -> None:
    """Not a graph of trees, which nobody prepared."""
    desc = manager.dispatch(64, 64, 1, 0, max_query_len=1)
    assert (desc.cg_mode.name, desc.uniform_token_count) == ("FULL", 1)
    desc = manager.dispatch(3, 3, 1, 0, max_query_len=1)
    assert (desc.num_tokens, desc.uniform_token_count) == (4, 1)


def test_prefill(manager: Any) -> None:
    desc = manager.dispatch(2, T + 40, None, 0, max_query_len=None)
    assert desc.cg_mode.name == "PIECEWISE"
    desc = manager.dispatch(2, 4000, None, 0, max_query_len=None)
    assert desc.cg_mode.name == "NONE"


@pytest.mark.parametrize("params", [*PARAMS, LookaheadParams(30, 5, 1), *WIDE])
def test_capture(params: LookaheadParams, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(monkeypatch, params)
    full = manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [desc.num_tokens for desc in full]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(full)) == len(full)
    trees = tree_graphs(manager)
    assert len(trees) <= 73
    assert max(d.num_tokens for d in trees) == max(LARGEST, params.max_tree_size)
    for desc in trees:  # as vLLM's dummy batch wants it
        assert desc.num_reqs <= desc.num_tokens <= desc.num_reqs * desc.max_query_len


@pytest.mark.parametrize("num_kv_heads", [8, 2])
def test_few_requests_split_contexts(
    num_kv_heads: int, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of few requests splits a long context, so that no SM idles."""
    from vllm_lookahead.triton_kernels import attention, attention_config

    launches: list[tuple[int, int, int]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            return lambda *args, **kwargs: launches.append(grid)

    monkeypatch.setattr(attention, "tree_attention_kernel", Kernel())
    monkeypatch.setattr(attention, "merge_splits_kernel", Kernel())
    monkeypatch.setattr(attention_config, "num_sms", lambda: 132)
    scratch = attention_config.SplitScratch.allocate(128, "cpu")
    cache = torch.zeros(1, 16, num_kv_heads, 128, dtype=torch.bfloat16)
    for desc in manager._capture_descs[CUDAGraphMode.FULL]:
        if desc.max_query_len is None:
            continue
        count = desc.num_reqs
        batch = attention_config.TreeBatch(
            torch.zeros(count + 1, dtype=torch.int32),
            torch.zeros(count, dtype=torch.int32),
            torch.zeros(count, 1, dtype=torch.int32),
            torch.zeros(count, T, 4, dtype=torch.int32),
            T,
            max_context_len=32768,
        )
        q = cache.new_zeros(desc.num_tokens, 4 * num_kv_heads, 128)
        launches.clear()
        attention.tree_attention(q, cache, cache, batch, q, 1.0, scratch=scratch)
        splits = launches[0][1] // num_kv_heads
        if count == 4 and (num_kv_heads == 2 or desc.num_tokens < 2 * T):
            assert splits > 1
        elif count > 64:
            assert splits == 1


def test_trees_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager(monkeypatch, LookaheadParams(0, 2, 0))
    full = manager._capture_descs[CUDAGraphMode.FULL]
    assert {desc.uniform_token_count for desc in full} == {1}
