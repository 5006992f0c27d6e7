# SPDX-License-Identifier: Apache-2.0
"""Trees cut on the device to the likeliest nodes of a step; outputs are plain's."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.worker.gpu.async_utils import StepTimingSample

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, TIGHT, prompts, request, same_logprobs
from vllm_lookahead.engine.v2.forest import TreeTrimmer

# Nodes are free up to 6 tokens, and each of the next ones costs some percent.
STEP_TIMES = [[6, 1.0], *([n, 1.0 + 0.02 * (n - 6)] for n in range(7, 64))]
# T is 10, of trees that branch.
FOREST = {"default_sizes": [0, 4, 3, 10], "step_times": STEP_TIMES}
LAUNCHES = ("_rank_kernel", "_place_kernel")


def cut(
    engines: Engines,
    *batches: list[dict[str, Any]],
    watch: bool = False,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plain's result, and that of an engine whose trees are cut."""
    jobs = [*batches]
    chunk_rows = options.pop("chunk_rows", None)
    times = options.pop("step_times", STEP_TIMES)
    plain = engines.run(jobs, **options)
    options |= FOREST | {"chunk_rows": chunk_rows, "step_times": times}
    result = engines.run(jobs, {}, watch=watch, **options)
    for one, other in zip(plain["outputs"], result["outputs"], strict=True):
        assert other["tokens"] == one["tokens"]
    assert any(nodes for nodes, _ in result["cut"])
    return plain, result


@pytest.fixture(scope="module")
def mixed() -> list[dict[str, Any]]:
    """Greedy and sampled, off, and with sizes and penalties of their own."""
    own: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 3, "logprobs": 1},
        {"extra_args": {"lookahead": 0}},
        {"repetition_penalty": 1.3},
        {"extra_args": {"lookahead_node_budget": 5}},
        {"temperature": 0.7, "top_p": 0.9, "seed": 4},
    ]
    texts = prompts(len(own), seed=60, longest=20)
    return [
        request(t, max_tokens=6 + i % 3, **o)
        for i, (t, o) in enumerate(zip(texts, own, strict=True))
    ]


def test_mixed_batch(engines: Engines, mixed: list[dict[str, Any]]) -> None:
    """Six requests, four at a time: some are prefilled beside trees that are cut."""
    plain, result = cut(engines, mixed)
    same_logprobs(plain, result)
    assert result["metrics"][ACCEPTED] > 0
    assert any(tokens > 4 for _, tokens in result["cut"])


def test_chunked_prefill(engines: Engines) -> None:
    """Prompts in chunks beside trees that are cut; nobody waits for the device."""
    long = prompts(1, seed=11)[0] + list(range(2, 75))
    sampled = {"temperature": 0.8, "seed": 4}
    first = [request([3, 4], max_tokens=4)]  # what trees are like is known behind it
    batch = [request([5, 6, 7], **sampled), request([8, 9]), request(long[:70])]
    options = TIGHT | {"long_prefill_token_threshold": 24}
    _, result = cut(engines, first, batch, watch=True, **options)
    assert result["chunks"][1] > 0 and any(tokens > 4 for _, tokens in result["cut"])
    watched = result["watched"]
    assert not watched["waits"]
    # Two launches more than where trees are fed whole, see `test_no_wait.py`.
    assert {name: watched["most_launched"][name] for name in LAUNCHES} == dict.fromkeys(
        LAUNCHES, 1
    )
    assert set(watched["most_launched"].values()) <= {1, 2}  # 2 layers attend
    # And a copy of the chances.
    assert sum(watched["operated"].values()) <= 13, watched["operated"]


def test_in_few_rows_and_beside_a_grammar(engines: Engines) -> None:
    """Logits that fit once for few nodes only; trees that the host cuts alike."""
    texts = prompts(4, seed=61, longest=9)
    batch = [request(t, max_tokens=8) for t in texts]
    batch[1] = request(texts[1], regex="[ab]{8}", max_tokens=4, ignore_eos=False)
    cut(engines, batch, chunk_rows=9, async_scheduling=False)


def test_beside_a_chain_that_is_narrower_than_an_even_share(engines: Engines) -> None:
    """Ten nodes of two requests, of which one may have three."""
    first, second = prompts(2, seed=61, longest=20)
    batch = [
        request(first, max_tokens=12, repetition_penalty=1.2),
        request(second, max_tokens=12),
    ]
    times = [[12, 1.0], *([n, 9.0] for n in range(13, 64))]
    _, result = cut(engines, batch, step_times=times)
    assert any(nodes == 10 for nodes, _ in result["cut"])


def test_times_are_measured_by_graph_and_told_once() -> None:
    """Medians of what vLLM's runner times: one token a request, without a context."""
    trimmer: Any = object.__new__(TreeTrimmer)
    trimmer.req_states = SimpleNamespace(max_num_batched_tokens=64)
    batches = list(trimmer.batches_to_profile([16, 32]))
    assert {batch["context_len"] for batch in batches} == {0}
    assert {batch["num_tokens"] for batch in batches} == {16, 32, 48, 64}
    took = {16: (1.0, 9.0, 1.5), 32: (2.0,), 48: (5.0,)}
    samples = [
        StepTimingSample(ms, 0.1, tokens, tokens, tokens <= 32)
        for tokens, times in took.items()
        for ms in times
    ]
    trimmer.set_initial_cost_curves(samples)
    assert trimmer.take_times() == ([(16, 1.5), (32, 2.0), (48, 5.0)], 32)
    assert trimmer.take_times() is None
