# SPDX-License-Identifier: Apache-2.0
"""The configuration under which vLLM's runner works."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig

from vllm_lookahead.engine.cpu import linear
from vllm_lookahead.engine.cpu.runner import LookaheadCPUModelRunner
from vllm_lookahead.engine.cpu.sampling import upcoming_draws
from vllm_lookahead.engine.cpu.worker import plain_config
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


def test_draws_are_unknown_of_a_sampler_that_says_less() -> None:
    """vLLM 0.33 might know `use_fp64_gumbel` by another name."""

    def forward_cpu() -> None:
        pass

    runner = SimpleNamespace(
        input_batch=SimpleNamespace(
            sampling_metadata=SimpleNamespace(all_greedy=False)
        ),
        sampler=SimpleNamespace(topk_topp_sampler=SimpleNamespace(forward=forward_cpu)),
        bigram_logits=torch.zeros(2, 2),
    )
    assert upcoming_draws(runner, torch.zeros(1).numpy()) is None  # type: ignore[arg-type]
