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
    in_batches,
    prompts,
    request,
    same_as_plain,
    same_logprobs,
)


def in_fours(requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return in_batches(requests, 4)


def test_greedy(kernels: Engines) -> None:
    jobs = in_fours([request(p) for p in prompts(8, seed=1)])
    metrics = same_as_plain(kernels, jobs)["metrics"]
    assert metrics[ACCEPTED] > 0
    assert metrics["vllm:spec_decode_num_draft_tokens"] <= 2 * metrics[DRAFTS]


def test_seeded(kernels: Engines) -> None:
    sampling = [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 0.5, "min_p": 0.05},
    ]
    jobs = in_fours(
        [
            request(p, seed=i, **sampling[i % 4])
            for i, p in enumerate(prompts(8, seed=2))
        ]
    )
    assert same_as_plain(kernels, jobs)["metrics"][ACCEPTED] > 0


def test_mixed_batch(kernels: Engines) -> None:
    """Off, smaller than the server's, sampled and greedy side by side."""
    texts = prompts(8, seed=3)
    extra = [
        {"lookahead": 0},
        None,
        {"lookahead_window_size": 0, "lookahead_verification_set_size": 1},
        {"lookahead_ngram_size": 2},
    ]
    requests = []
    for i, text in enumerate(texts):
        own = {} if i < 4 else {"temperature": 0.8, "seed": 9}
        requests.append(request(text, extra_args=extra[i % 4], **own))
    same_as_plain(kernels, in_fours(requests))


def test_switched_off(engines: Engines) -> None:
    jobs = [[request(p, extra_args={"lookahead": 0}) for p in prompts(2, seed=4)]]
    assert same_as_plain(engines, jobs)["metrics"].get(DRAFTS, 0) == 0


def test_prefix_caching(kernels: Engines) -> None:
    shared = prompts(1, seed=5, longest=1)[0] * 3 + list(range(2, 72))
    tails = prompts(4, seed=6, longest=9)
    jobs = [[request(shared + tail)] for tail in tails[:2]]
    jobs.append([request(shared + tail) for tail in tails])
    result = same_as_plain(kernels, jobs)
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


def test_chunked_prefill(engines: Engines) -> None:
    long = prompts(1, seed=11)[0] + list(range(2, 75))
    jobs = [[request(prompts(1, seed=12, longest=5)[0]), request(long[:80])]]
    same_as_plain(engines, jobs, **TIGHT)


def test_preemption(engines: Engines) -> None:
    texts = [list(range(i, i + 30)) for i in (2, 20, 40, 60)]
    result = same_as_plain(
        engines, [[request(t, max_tokens=40) for t in texts]], **TIGHT
    )
    assert result["metrics"]["vllm:num_preemptions"] > 0


def test_max_model_len(engines: Engines) -> None:
    texts = [list(range(2, 2 + n)) for n in (80, 84, 90)]
    result = same_as_plain(
        engines, [[request(t, max_tokens=40) for t in texts]], **TIGHT
    )
    assert {len(o["tokens"]) for o in result["outputs"]} == {16, 12, 6}


def test_same_as_v1(engines: Engines, v1: Engines) -> None:
    jobs = in_fours([request(p) for p in prompts(8, seed=1)])
    expected = v1.run(jobs)["outputs"]
    result = engines.run(jobs, SMALL)["outputs"]
    assert [o["tokens"] for o in result] == [o["tokens"] for o in expected]


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
    result = engines.run(jobs, SMALL, chunk_rows=12)
    for one, other in zip(plain["outputs"], result["outputs"], strict=True):
        assert other["tokens"] == one["tokens"]
    assert len(result["outputs"][0]["logprobs"]) == 12


@pytest.mark.slow
def test_synchronous(engines: Engines) -> None:
    jobs = in_fours([request(p) for p in prompts(4, seed=14)])
    result = engines.run(jobs, SMALL, async_scheduling=False)["outputs"]
    plain = engines.run(jobs)["outputs"]
    assert [o["tokens"] for o in result] == [o["tokens"] for o in plain]


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


def test_bigrams_of_the_model(engines: Engines) -> None:
    bigrams_are_drafted(engines)
