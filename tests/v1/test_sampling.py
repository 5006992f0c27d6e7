# SPDX-License-Identifier: Apache-2.0
"""Whatever changes the logits or reads them, the outcome is plain vLLM's."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import _custom_ops  # noqa: F401  loads the kernels
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from tests.harness.engines import Engines
from tests.harness.jobs import (
    ACCEPTED,
    prompts,
    request,
    same_as_plain,
    same_logprobs,
)
from tests.v1.test_lossless import DEFAULT, FULL, TREE
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.engine.v1.sampling import upcoming_noise


def test_history(engines: Engines) -> None:
    """Logits that depend on earlier tokens other than through the model."""
    text = prompts(1, seed=7)[0] + [9, 10, 11, 12] * 4
    long = {"max_tokens": 40}
    jobs = [
        [
            request(text, repetition_penalty=1.05, **long),
            request(text, presence_penalty=0.2, frequency_penalty=0.1, **long),
            request(text, bad_words=["a", "bc", "~"], **long),
            request(text, **long),
        ],
        [
            request(text, min_tokens=8, stop_token_ids=list(range(2, 60)), **long),
            request(text, logit_bias={5: 2.0, 9: -3.0}, **long),
            request(text, allowed_token_ids=list(range(8, 40)), **long),
            request(text, repetition_penalty=1.2, temperature=0.7, seed=1, **long),
        ],
    ]
    same_as_plain(engines, jobs, FULL)


def test_logprobs(engines: Engines) -> None:
    text = [9, 10, 11, 12] * 6
    jobs = [
        [request(text, logprobs=2), request(text, temperature=0.7, seed=3)],
        [request(text, logprobs=0, prompt_logprobs=1), request(text, logprobs=3)],
        [request(text, logprobs=-1, max_tokens=3)],
    ]
    options = {"max_logprobs": -1}
    plain = engines.run(jobs, **options)
    result = same_as_plain(engines, jobs, TREE, **options)
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
    same_as_plain(engines, jobs, FULL)


JSON = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 2}], ids=str)
def test_kinds_of_grammar(engines: Engines, sampling: dict[str, Any]) -> None:
    text = prompts(1, seed=10)[0]
    own = {"ignore_eos": False, "max_tokens": 30} | sampling
    jobs = [
        [
            request(text, json=JSON, **own),
            request(text, **sampling),
            request(text, choice=["yes, indeed", "yes or no", "no"], **own),
        ]
    ]
    outputs = same_as_plain(engines, jobs, FULL)["outputs"]
    assert outputs[0]["text"].lstrip().startswith("{")
    assert outputs[2]["text"] in ("yes, indeed", "yes or no", "no")


def test_logprobs_of_given_tokens(engines: Engines) -> None:
    text = [9, 10, 11, 12] * 6
    jobs = [
        [request(text, logprob_token_ids=[3, 9, 40]), request(text)],
        [request(text, logprob_token_ids=[5]), request(text, logprobs=3)],
    ]
    plain = engines.run(jobs)
    same_logprobs(plain, same_as_plain(engines, jobs, TREE))


def test_thinking_budget(engines: Engines) -> None:
    """A budget that ends within what would be an n-gram, beside other requests."""
    reasoning = {"reasoning_start_str": "<", "reasoning_end_str": "@"}
    text = [9, 10, 11, 12] * 6 + [ord("<") - 30]
    sampled = {"temperature": 0.7, "seed": 1}
    jobs = [
        [
            request(text, thinking_token_budget=5, max_tokens=30),
            request(text, max_tokens=30),
            request(text, thinking_token_budget=7, max_tokens=30, **sampled),
        ]
    ]
    result = same_as_plain(engines, jobs, TREE, reasoning_config=reasoning)
    for output, budget in zip(result["outputs"], (5, None, 7), strict=True):
        ends = [i for i, t in enumerate(output["tokens"]) if t == ord("@") - 30]
        assert ends[:1] == ([] if budget is None else [budget])


def test_custom_logits_processor(engines: Engines) -> None:
    text = [9, 10, 11, 12] * 6
    options = {"logits_processors": ["processors:NoTokenTwiceInARow"]}
    job = [[request(text, max_tokens=30), request(text, temperature=0.8, seed=2)]]
    result = same_as_plain(engines, job, TREE, **options)
    tokens = result["outputs"][0]["tokens"]
    assert all(a != b for a, b in zip(tokens, tokens[1:], strict=False))


def chi_square(one: Counter[Any], other: Counter[Any]) -> tuple[float, int]:
    """Two-sample statistic and degrees of freedom; rare outcomes are pooled."""
    total_one, total_other = one.total(), other.total()
    cells: list[tuple[int, int]] = []
    rare = [0, 0]
    for outcome in one | other:
        a, b = one[outcome], other[outcome]
        if a + b < 20:
            rare[0] += a
            rare[1] += b
        else:
            cells.append((a, b))
    cells.append((rare[0], rare[1]))
    statistic = 0.0
    for a, b in cells:
        if a + b:
            expected = (a + b) * total_one / (total_one + total_other)
            statistic += (a - expected) ** 2 / expected
            expected = a + b - expected
            statistic += (b - expected) ** 2 / expected
    return statistic, len(cells) - 1


@pytest.mark.parametrize("lookahead", [TREE, DEFAULT], ids=["tree", "default"])
def test_unseeded_distribution(engines: Engines, lookahead: dict[str, int]) -> None:
    """20,000 draws of four tokens, with candidates that agree in part."""
    options = {"max_num_seqs": 64, "kv_cache_memory_bytes": 64 << 20}
    sampling = {"temperature": 0.1, "max_tokens": 4, "n": 500}
    # The prompt ends in the root, which it holds before each likely continuation.
    root = 20
    likely = engines.run([[request([root], **sampling)]], **options)["samples"]
    common = Counter(tuple(s[:3]) for s in likely).most_common(6)
    text = [token for chain, _ in common for token in (root, *chain)] + [root]
    jobs = [[request(text, **sampling) for _ in range(10)] for _ in range(4)]
    plain = engines.run(jobs, **options)["samples"]
    drafted = engines.run(jobs, lookahead, watch="trees", **options)
    # Of all tokens but the prefills', of which there are three times 20,000.
    assert drafted["metrics"][ACCEPTED] > 0.2 * 60_000
    if lookahead is TREE:  # the default is one chain
        watched = drafted["watched"]
        assert watched["branched"] > 0.2 * watched["trees"]
        assert watched["merged"] > 1000
    assert len(plain) == len(drafted["samples"]) == 20_000
    outcomes = 0
    for length in (1, 2, 3, 4):
        one = Counter(tuple(s[:length]) for s in plain)
        other = Counter(tuple(s[:length]) for s in drafted["samples"])
        statistic, freedom = chi_square(one, other)
        outcomes += freedom
        # 4.5 standard deviations of the chi-square distribution: about 1 in 10^5.
        assert statistic <= freedom + 4.5 * (2 * freedom) ** 0.5
    assert outcomes > 20


@pytest.mark.parametrize("seeded", [[0, 1, 2], [1], []], ids=str)
def test_the_noise_of_the_sampler_is_known(seeded: list[int]) -> None:
    """Drafts are ranked by the noise that vLLM's sampler then draws."""
    torch.manual_seed(5)
    num_requests, depths, temperature = 3, 4, torch.tensor([0.5, 1.0, 2.0])
    generators = {i: torch.Generator().manual_seed(i) for i in seeded}
    sampler = TopKTopPSampler()
    runner: Any = SimpleNamespace(
        input_batch=SimpleNamespace(
            sampling_metadata=SimpleNamespace(
                all_greedy=False, generators=generators, temperature=temperature
            ),
            num_reqs=num_requests,
        ),
        sampler=SimpleNamespace(topk_topp_sampler=sampler),
    )
    rows = np.array([0, 2])
    all_logits = torch.randn(depths, num_requests, 200) / temperature[:, None]
    known, seeds = upcoming_noise(runner, rows, depths)
    assert known.tolist() == [0.5, 2.0]
    for depth, logits in enumerate(all_logits):
        drawn, _ = sampler(logits.clone(), generators, None, None)
        keys = seeds[:, depth].tolist()
        noise = [[cpu_noise(key, 0, token) for token in range(200)] for key in keys]
        noised = logits[rows].double() + torch.tensor(noise, dtype=torch.float64)
        assert torch.equal(drawn[rows], noised.argmax(-1))
