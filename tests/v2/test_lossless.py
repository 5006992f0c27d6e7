# SPDX-License-Identifier: Apache-2.0
"""V2 with lookahead says what plain V2 says, token for token."""

from typing import Any

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import (
    ACCEPTED,
    DRAFTS,
    SMALL,
    TIGHT,
    bigrams_are_drafted,
    budgets_of_nodes,
    in_batches,
    prompts,
    request,
    same_as_plain,
    same_but_for_ties,
    same_logprobs,
    same_outputs,
)


def in_fours(requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return in_batches(requests, 4)


TEXTS = prompts(20, seed=1)
GREEDY = in_fours([request(t, max_tokens=7 + i % 5) for i, t in enumerate(TEXTS)])
SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 0.5, "min_p": 0.05},
]
SEEDED = in_fours(
    [
        request(t, max_tokens=7 + i % 5, seed=i, **SAMPLERS[i % 4])
        for i, t in enumerate(TEXTS)
    ]
)


@pytest.fixture(scope="module")
def greedy(engines: Engines) -> dict[str, Any]:
    return engines.run(GREEDY, SMALL)


def test_greedy(engines: Engines, greedy: dict[str, Any]) -> None:
    same_outputs(engines.run(GREEDY), greedy)
    metrics = greedy["metrics"]
    assert metrics[ACCEPTED] > 0
    assert metrics["vllm:spec_decode_num_draft_tokens"] <= 2 * metrics[DRAFTS]


def test_seeded(engines: Engines) -> None:
    """The prompts of `test_greedy`."""
    assert same_as_plain(engines, SEEDED)["metrics"][ACCEPTED] > 0


def test_same_as_cpu_engine(greedy: dict[str, Any], v1: Engines) -> None:
    result = v1.run(GREEDY, SMALL)
    assert result["metrics"][ACCEPTED] > 0
    same_outputs(result, greedy)


def test_mixed_batch(engines: Engines) -> None:
    """Off, smaller than the server's, sampled and greedy side by side."""
    extra = [
        {"lookahead": 0},
        None,
        {"lookahead_window_size": 0, "lookahead_verification_set_size": 1},
        {"lookahead_ngram_size": 2},
    ]
    requests = []
    for i, text in enumerate(prompts(20, seed=3)):
        own = {} if i % 8 < 4 else {"temperature": 0.8, "seed": i}
        length = 6 + i % 5
        requests.append(
            request(text, max_tokens=length, extra_args=extra[i % 4], **own)
        )
    assert same_as_plain(engines, in_fours(requests))["metrics"][ACCEPTED] > 0


def test_switched_off(engines: Engines) -> None:
    jobs = [[request(p, extra_args={"lookahead": 0}) for p in prompts(2, seed=4)]]
    assert same_as_plain(engines, jobs)["metrics"].get(DRAFTS, 0) == 0


def test_prefix_caching(engines: Engines) -> None:
    shared = prompts(1, seed=5, longest=1)[0] * 3 + list(range(2, 72))
    tails = prompts(4, seed=6, longest=9)
    jobs = [[request(shared + tail)] for tail in tails[:2]]
    jobs.append([request(shared + tail) for tail in tails])
    result = same_as_plain(engines, jobs)
    assert all(output["cached"] >= 64 for output in result["outputs"][1:])


def test_history(engines: Engines) -> None:
    """Logits that depend on earlier tokens other than through the model."""
    text = prompts(1, seed=7)[0]
    same_as_plain(
        engines,
        [
            [
                request(text, repetition_penalty=1.5),
                request(text, presence_penalty=0.5, frequency_penalty=0.5),
                request(text, bad_words=["a", "bc", "~"]),
                request(text),
            ],
            [
                request(text, min_tokens=8, stop_token_ids=list(range(2, 60))),
                request(text, logit_bias={5: 2.0, 9: -3.0}),
                request(text, allowed_token_ids=list(range(20, 40))),
                request(text, repetition_penalty=1.2, temperature=0.7, seed=1),
            ],
        ],
    )


def test_stops(engines: Engines) -> None:
    """A stop token, wherever in an accepted n-gram it comes."""
    text = prompts(1, seed=8)[0]
    tokens = engines.run([[request(text)]])["outputs"][0]["tokens"]
    jobs = [[request(text, stop_token_ids=[t]) for t in tokens[i : i + 4]]
            for i in (0, 4)]  # fmt: skip
    same_as_plain(engines, [*jobs, [request(text, max_tokens=n) for n in (1, 2, 3, 5)]])


def test_logprobs(engines: Engines) -> None:
    text = prompts(1, seed=9)[0]
    jobs = [[request(text, logprobs=2), request(text, temperature=0.7, seed=3)]]
    jobs += [[request(text, logprobs=0, prompt_logprobs=1), request(text, logprobs=3)]]
    # Fewer rows of logits than N for each request: they are scored in parts.
    off = {"lookahead": 0}
    narrow = {"lookahead_window_size": 0, "lookahead_ngram_size": 2}
    jobs += [
        [
            request(text, logprobs=2, extra_args=narrow),
            *(request(text, logprobs=i, extra_args=off) for i in range(3)),
        ]
    ]
    plain, result = engines.run(jobs), same_as_plain(engines, jobs)
    same_logprobs(plain, result)


def test_grammar(engines: Engines) -> None:
    text = prompts(1, seed=10)[0]
    jobs = [
        [
            request(text, regex="[ab]{3}(cd|ef){2,4}", ignore_eos=False),
            request(text),
            request(text, regex="[0-9]{6}", ignore_eos=False),
        ]
    ]
    same_as_plain(engines, jobs)


def test_logits_in_chunks(engines: Engines) -> None:
    """More rows than fit at once, with a grammar and logprobs among them."""
    a, b, c, d = prompts(4, seed=13)
    jobs = [
        [
            request(a, logprobs=1),
            request(b, regex="[ab]{8}", ignore_eos=False),
            request(c, temperature=0.7, seed=2),
            request(d),
        ]
    ]
    plain = engines.run(jobs)
    result = engines.run(jobs, SMALL, chunk_rows=12, watch=True)
    assert not result["watched"]["waits"]
    same_outputs(plain, result)
    same_logprobs(plain, result)


def test_chunked_prefill(engines: Engines) -> None:
    """Prompts in four chunks, beside a request whose tree has room in the step."""
    long = prompts(1, seed=11)[0] + list(range(2, 75))
    sampled = {"temperature": 0.8, "seed": 4}
    jobs = [[request([5, 6, 7]), request(long[:80], **sampled)]]
    jobs.append([request([8, 9], **sampled), request(long[3:83])])
    options = TIGHT | {"long_prefill_token_threshold": 24}
    result = same_as_plain(engines, jobs, watch=True, **options)
    assert result["chunks"] == [6, 4]
    assert not result["watched"]["waits"]


def test_preemption(engines: Engines) -> None:
    """Greedy and seeded requests, each after some tokens of its own."""
    own: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 4}] * 2
    texts = [list(range(i, i + 50)) for i in (2, 15, 28, 41)]
    jobs = [[request(t, max_tokens=24, **o) for t, o in zip(texts, own, strict=True)]]
    result = same_as_plain(engines, jobs, **TIGHT)
    assert result["metrics"]["vllm:num_preemptions"] > 0


def test_max_model_len(engines: Engines) -> None:
    texts = [list(range(2, 2 + n)) for n in (80, 84, 90)]
    result = same_as_plain(
        engines, [[request(t, max_tokens=40) for t in texts]], **TIGHT
    )
    assert {len(o["tokens"]) for o in result["outputs"]} == {16, 12, 6}


def test_another_shape(engines: Engines) -> None:
    """Heads of 64, one K/V head for all, blocks of 64 that fill up and are shared."""
    shared = list(range(2, 60))
    jobs = [[request(shared, max_tokens=12)]]
    jobs.append([request(shared + t, max_tokens=8) for t in prompts(3, 15, longest=9)])
    options = {"model": [0, 1, 0.08, 64], "block_size": 64}
    result = same_as_plain(engines, jobs, **options)
    assert result["metrics"][ACCEPTED] > 0


def test_bf16(engines: Engines) -> None:
    """Outputs part ways only where plain vLLM's two likeliest tokens tie."""
    texts = prompts(8, seed=9)
    plain = engines.run(
        in_fours([request(t, logprobs=4) for t in texts]), dtype="bfloat16"
    )
    result = engines.run(in_fours([request(t) for t in texts]), SMALL, dtype="bfloat16")
    assert result["metrics"][ACCEPTED] > 0
    same_but_for_ties(plain, result, gap=0.1)


def test_synchronous(engines: Engines) -> None:
    jobs = in_fours([request(p) for p in prompts(4, seed=14)])
    result = engines.run(jobs, SMALL, async_scheduling=False)
    same_outputs(engines.run(jobs), result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [(0, 4, 3), (1, 2, 1), (5, 2, 3), (4, 3, 0), (5, 5, 5), (15, 5, 15), (0, 2, 0)],
)
@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_sizes(
    engines: Engines, sizes: tuple[int, int, int], num_kv_heads: int
) -> None:
    names = ("window_size", "ngram_size", "verification_set_size")
    jobs = in_fours([request(p) for p in prompts(4, seed=20)])
    lookahead = dict(zip(names, sizes, strict=True))
    same_as_plain(engines, jobs, lookahead, model=[1, num_kv_heads])


def test_budgets_of_nodes(engines: Engines) -> None:
    budgets_of_nodes(engines)


def test_bigrams_of_the_model(engines: Engines) -> None:
    bigrams_are_drafted(engines)
