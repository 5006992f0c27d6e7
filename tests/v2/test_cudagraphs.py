# SPDX-License-Identifier: Apache-2.0
"""Which graph a step would replay. Nothing is captured: that takes a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

T, REQUESTS = 120, 64


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils

    from vllm_lookahead.engine.gpu.cudagraph import LookaheadCudaGraphManager

    one = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    platform = SimpleNamespace(get_global_graph_pool=lambda: None)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: one)
    monkeypatch.setattr(cudagraph_utils, "current_platform", platform)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(
            max_num_seqs=REQUESTS, max_num_batched_tokens=8192
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)],
            max_cudagraph_capture_size=512,
        ),
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    manager = LookaheadCudaGraphManager(
        config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, max_tree_size=T
    )
    manager._graphs_captured = True
    return manager


def test_uniform_trees(manager: Any) -> None:
    for count in (1, 2, 5, 16):
        desc = manager.dispatch(count, count * T, T, 0, max_query_len=T)
        assert desc.cg_mode.name == "FULL"
        assert desc.uniform_token_count == T
        assert desc.num_reqs == {1: 1, 2: 2, 5: 6, 16: 16}[count]
        assert desc.num_tokens == desc.num_reqs * T


def test_mixed_widths(manager: Any) -> None:
    desc = manager.dispatch(40, 2 * T + 38, None, 0, max_query_len=T)
    assert desc.cg_mode.name == "FULL"
    assert (desc.num_tokens, desc.max_query_len) == (3 * T, T)
    assert desc.num_reqs == REQUESTS


def test_without_trees(manager: Any) -> None:
    """Not a graph of trees, which nobody prepared."""
    desc = manager.dispatch(REQUESTS, REQUESTS, 1, 0, max_query_len=1)
    assert (desc.cg_mode.name, desc.uniform_token_count) == ("FULL", 1)
    desc = manager.dispatch(3, 3, 1, 0, max_query_len=1)
    assert (desc.num_tokens, desc.uniform_token_count) == (4, 1)


def test_prefill(manager: Any) -> None:
    desc = manager.dispatch(2, T + 40, None, 0, max_query_len=None)
    assert desc.cg_mode.name == "PIECEWISE"
    desc = manager.dispatch(2, 4000, None, 0, max_query_len=None)
    assert desc.cg_mode.name == "NONE"


def test_capture_order(manager: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode

    full = manager._capture_descs[CUDAGraphMode.FULL]
    sizes = [desc.num_tokens for desc in full]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(full)) == len(full) < 40
    assert max(sizes) == 16 * T
