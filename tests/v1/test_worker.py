# SPDX-License-Identifier: Apache-2.0
"""The configuration under which vLLM's runner works."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import VllmConfig

from vllm_lookahead.engine.v1 import linear
from vllm_lookahead.engine.v1.model_runner import LookaheadCPUModelRunner
from vllm_lookahead.engine.v1.sampling import upcoming_noise
from vllm_lookahead.engine.v1.worker import plain_config
from vllm_lookahead.numba_kernels.layout import feed_trees
from vllm_lookahead.params import LookaheadParams

PARAMS = LookaheadParams(0, 5, 4)


def test_graphs_are_told_apart_by_the_linear_layers_that_they_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As these depend on the CPU and its threads, which vLLM's hash leaves out."""
    config = VllmConfig(additional_config={"mine": 1})
    hashes = {config.compute_hash()}
    for is_useful in (True, False):
        monkeypatch.setattr(linear, "is_useful", lambda answer=is_useful: answer)
        plain = plain_config(config)
        assert plain.additional_config["mine"] == 1
        hashes.add(plain.compute_hash())
    assert len(hashes) == 3


def test_fast_prefill_is_refused_by_name() -> None:
    config = VllmConfig()
    config.cache_config.kv_sharing_fast_prefill = True
    words = "lookahead does not run with kv_sharing_fast_prefill: switch it off, or"
    with pytest.raises(ValueError, match=words):
        LookaheadCPUModelRunner(config, torch.device("cpu"), PARAMS, False)


def test_noise_is_unknown_of_a_sampler_that_says_less() -> None:
    """vLLM 0.33 might know `use_fp64_gumbel` by another name."""

    def forward_cpu() -> None:
        pass

    runner: Any = SimpleNamespace(
        input_batch=SimpleNamespace(
            sampling_metadata=SimpleNamespace(all_greedy=False), num_reqs=1
        ),
        sampler=SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=forward_cpu)),
    )
    temperature, _ = upcoming_noise(runner, np.zeros(1, np.int64), 4)
    assert temperature.tolist() == [0.0]


def test_a_step_of_trees_alone_feeds_what_vllm_would() -> None:
    """Two chains, of 3 and 2 nodes, at 4 and 7, in blocks of 4 slots."""
    outs = [np.full(8, -7, kind) for kind in (np.int32, np.int64, np.int64)]
    outs += [np.full(4, -7, np.int32) for _ in range(3)]
    tokens, positions, slots, query_start, seq_lens, upper_bounds = outs
    fed = np.array([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5], [4, 5, 6, 7, 8]])
    table = np.array([[5, 2, 0], [3, 4, 1]], np.int32)
    at = np.array([4, 7], np.int32)
    roots = feed_trees(fed, np.array([0, 3, 5]), at, table, 4, *outs)
    assert tokens.tolist() == [9, 8, 7, 6, 5, -7, -7, -7]
    assert positions.tolist() == [4, 5, 6, 7, 8, -7, -7, -7]
    assert slots.tolist() == [8, 9, 10, 19, 4, -7, -7, -7]
    assert roots.tolist() == [8, 19]
    assert query_start.tolist() == [0, 3, 5, 5]
    assert seq_lens.tolist() == upper_bounds.tolist() == [7, 9, 0, 0]
