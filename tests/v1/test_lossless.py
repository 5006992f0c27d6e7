# SPDX-License-Identifier: Apache-2.0
"""The CPU engine says what plain vLLM says, token for token, in fp32."""

from typing import Any

import pytest
import torch

from tests.harness.engines import Engines
from tests.harness.jobs import (
    ACCEPTED,
    DRAFTED,
    DRAFTS,
    TIGHT,
    bigrams_are_drafted,
    budgets_of_nodes,
    in_batches,
    prompts,
    request,
    same_as_plain,
)

CHAIN = {"window_size": 0, "ngram_size": 6, "verification_set_size": 1}
TREE = {"window_size": 0, "ngram_size": 5, "verification_set_size": 4}
FULL = {"window_size": 5, "ngram_size": 4, "verification_set_size": 5}
DEFAULT: dict[str, int] = {}
# Seed and K/V heads of 4: grouped, multi-head and multi-query attention.
SHAPES = [[0, 2], [1, 4], [2, 1]]
SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 0.5, "min_p": 0.05},
]


@pytest.mark.parametrize("model", SHAPES, ids=str)
@pytest.mark.parametrize(
    "lookahead", [CHAIN, TREE, FULL, DEFAULT], ids=["chain", "tree", "full", "default"]
)
def test_greedy_and_seeded(
    engines: Engines, model: list[int], lookahead: dict[str, int]
) -> None:
    """64 prompts, from 1 token up, in batches of 12 that drain to 1."""
    texts = prompts(64, seed=100 + model[0])
    greedy = [request(t, max_tokens=20 + 3 * (i % 8)) for i, t in enumerate(texts)]
    seeded = [
        request(t, max_tokens=24, seed=i, **SAMPLERS[i % 4])
        for i, t in enumerate(texts)
    ]
    jobs = in_batches(greedy, 12) + in_batches(seeded, 12)
    result = same_as_plain(engines, jobs, lookahead, model=model, max_num_seqs=12)
    metrics, depth = result["metrics"], lookahead.get("ngram_size", 8) - 1
    drafted, accepted = metrics[DRAFTED], metrics[ACCEPTED]
    # Neither the window's tokens nor those of other candidates are drafts.
    assert 0 < accepted <= drafted <= depth * metrics[DRAFTS]
    assert result["accepted_at"] == sorted(result["accepted_at"], reverse=True)
    assert len(result["accepted_at"]) == depth
    assert sum(result["accepted_at"]) == accepted


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_sizes_and_prefix_caching(engines: Engines, block_size: int) -> None:
    shared = [5, 6, 7, 8, 9, 10, 11, 12] * 20
    tails = prompts(6, seed=6, longest=9)
    jobs = [[request(shared + tail, max_tokens=40)] for tail in tails[:3]]
    jobs.append([request(shared + tail, max_tokens=40) for tail in tails])
    options = {"block_size": block_size, "max_model_len": 384}
    for lookahead in (TREE, FULL):
        result = same_as_plain(engines, jobs, lookahead, **options)
        cached = [output["cached"] for output in result["outputs"][1:]]
        assert min(cached) >= 160 // block_size * block_size


@pytest.mark.parametrize("head_size", [32, 48])
def test_chains_keep_the_kernels_of_vllm(engines: Engines, head_size: int) -> None:
    """However these pack K/V, also after an engine that packed it otherwise."""
    texts = prompts(24, seed=8)
    seeded = [
        request(t, max_tokens=24, seed=i, **SAMPLERS[i % 4])
        for i, t in enumerate(texts)
    ]
    jobs = in_batches([request(t, max_tokens=32) for t in texts] + seeded, 8)
    model = [0, 2, 0.08, head_size]
    for lookahead in (CHAIN, TREE, CHAIN):
        result = same_as_plain(engines, jobs, lookahead, model=model)
        assert result["metrics"][ACCEPTED] > 0
        kind = "ChainAttentionImpl" if lookahead is CHAIN else "TreeAttentionImpl"
        assert result["attention"] == kind
        assert result["scheduler"] == "LookaheadAsyncScheduler"


@pytest.mark.parametrize(
    "lookahead", [CHAIN, FULL, DEFAULT], ids=["chain", "full", "default"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(engines: Engines, dtype: str, lookahead: dict[str, int]) -> None:
    """Outputs part ways only where plain vLLM's two likeliest tokens tie."""
    texts = prompts(16, seed=9)
    jobs = in_batches([request(t, max_tokens=24, logprobs=4) for t in texts], 12)
    plain = engines.run(jobs, dtype=dtype)["outputs"]
    jobs = in_batches([request(t, max_tokens=24) for t in texts], 12)
    result = engines.run(jobs, lookahead, dtype=dtype)
    assert result["metrics"][ACCEPTED] > 0
    for one, other in zip(plain, result["outputs"], strict=True):
        pairs = enumerate(zip(one["tokens"], other["tokens"], strict=True))
        parting = next((i for i, (a, b) in pairs if a != b), None)
        if parting is not None:
            likely = dict(one["logprobs"][parting])
            gap = likely[one["tokens"][parting]] - likely[other["tokens"][parting]]
            assert gap < (0.1 if dtype == "bfloat16" else 0.02)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 caches want AVX-512"
)
def test_fp8_cache(engines: Engines) -> None:
    jobs = in_batches([request(t, max_tokens=32) for t in prompts(24, seed=21)], 8)
    result = same_as_plain(engines, jobs, FULL, kv_cache_dtype="fp8")
    assert result["metrics"][ACCEPTED] > 0


def test_mixed_batch(engines: Engines) -> None:
    """Off, smaller than the server's, greedy and sampled side by side."""
    extra: list[dict[str, int] | None] = [
        {"lookahead": 0},
        None,
        {"lookahead_window_size": 0, "lookahead_verification_set_size": 1},
        {"lookahead_ngram_size": 2},
    ]
    requests = []
    for i, text in enumerate(prompts(16, seed=3)):
        own = {} if i % 8 < 4 else {"temperature": 0.8, "seed": 9}
        requests.append(request(text, max_tokens=30, extra_args=extra[i % 4], **own))
    same_as_plain(engines, in_batches(requests, 8), FULL, max_num_seqs=8)


def test_switched_off_drafts_nothing(engines: Engines) -> None:
    jobs = [[request(p, extra_args={"lookahead": 0}) for p in prompts(2, seed=4)]]
    metrics = same_as_plain(engines, jobs, FULL)["metrics"]
    assert metrics.get(DRAFTS, 0) == 0


def test_chunked_prefill(engines: Engines) -> None:
    long = prompts(1, seed=11)[0] + list(range(2, 75))
    first = request(prompts(1, seed=12, longest=5)[0], max_tokens=30)
    same_as_plain(engines, [[first, request(long[:80])]], FULL, **TIGHT)


@pytest.mark.parametrize("lookahead", [TREE, FULL], ids=["tree", "full"])
def test_preemption(engines: Engines, lookahead: dict[str, int]) -> None:
    texts = [list(range(i, i + 30)) for i in (2, 20, 40, 60)]
    jobs = [[request(t, max_tokens=50) for t in texts]]
    result = same_as_plain(engines, jobs, lookahead, **TIGHT)
    assert result["metrics"]["vllm:num_preemptions"] > 0


def test_seeded_prompt_chunks(engines: Engines) -> None:
    """A seeded request whose prompt comes in chunks.

    Plain vLLM 0.32 ends with an error there on a CPU, so it gets room enough.
    """
    sampled = {"temperature": 0.8, "seed": 4, "max_tokens": 50}
    jobs = [[request(list(range(i, i + 30)), **sampled) for i in (2, 20, 40, 60)]]
    plain = engines.run(jobs)["outputs"]
    result = engines.run(jobs, TREE, **TIGHT)
    assert result["metrics"]["vllm:num_preemptions"] > 0
    assert [o["tokens"] for o in result["outputs"]] == [o["tokens"] for o in plain]


def test_max_model_len(engines: Engines) -> None:
    texts = [list(range(2, 2 + n)) for n in (80, 84, 90, 95)]
    jobs = [[request(t, max_tokens=40)] for t in texts]
    jobs.append([request(t, max_tokens=40) for t in texts])
    result = same_as_plain(engines, jobs, FULL, **TIGHT)
    assert [len(o["tokens"]) for o in result["outputs"][:4]] == [16, 12, 6, 1]


def test_budgets_of_nodes(engines: Engines) -> None:
    budgets_of_nodes(engines)


def test_bigrams_of_the_model(engines: Engines) -> None:
    bigrams_are_drafted(engines)
