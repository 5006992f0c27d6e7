# SPDX-License-Identifier: Apache-2.0
"""Requests for `Engines.run`, and the comparison with plain decoding."""

import random
from typing import Any

import pytest

from tests.harness.engines import Engines

SMALL = {"window_size": 3, "ngram_size": 3, "verification_set_size": 3}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
DRAFTS = "vllm:spec_decode_num_drafts"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
COMMA = 14  # of the tokenizer of `make_model`
SURE = [0, 2, 0.3]  # a model whose likeliest token is likely
# A context, a batch and a K/V cache that requests run into the ends of.
TIGHT = {
    "max_model_len": 96,
    "max_num_batched_tokens": 96,
    "num_gpu_blocks_override": 9,
}


def prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return [[draw.randrange(2, 97) for _ in range(n)] for n in lengths]


def request(
    prompt: list[int],
    *,
    salt: str | None = None,
    abort_after: int | None = None,
    watch: bool | None = None,
    **params: Any,
) -> dict[str, Any]:
    """A request of a batch.

    Args:
        prompt: token ids.
        salt: `cache_salt`.
        abort_after: abort it once it has that many tokens.
        watch: count the Jacobi n-grams that it finds in its prompt's pages.
        params: of `SamplingParams`.
    """
    params = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.0} | params
    extra = {"salt": salt, "abort_after": abort_after, "watch": watch}
    given = {name: value for name, value in extra.items() if value is not None}
    return {"prompt": prompt, "params": params, **given}


def in_batches(requests: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def same_as_plain(
    engines: Engines,
    jobs: list[list[dict[str, Any]]],
    lookahead: dict[str, Any] = SMALL,
    **options: Any,
) -> dict[str, Any]:
    """Compare outputs with plain vLLM; return lookahead's result."""
    plain = engines.run(jobs, **options)
    result = engines.run(jobs, lookahead, **options)
    same_outputs(plain, result)
    return result


def same_outputs(plain: dict[str, Any], result: dict[str, Any]) -> None:
    """The same tokens, text and reasons to finish."""
    for one, other in zip(plain["outputs"], result["outputs"], strict=True):
        for name in ("tokens", "text", "reason", "stop"):
            assert other[name] == one[name]


def same_logprobs(plain: dict[str, Any], result: dict[str, Any]) -> None:
    """The same tokens in the same order, with logprobs that agree."""
    for one, other in zip(plain["outputs"], result["outputs"], strict=True):
        assert (one["logprobs"] is None) == (other["logprobs"] is None)
        pairs = zip(one["logprobs"] or [], other["logprobs"] or [], strict=True)
        for expected, got in pairs:
            assert [t for t, _ in got] == [t for t, _ in expected]
            assert [p for _, p in got] == pytest.approx(
                [p for _, p in expected], abs=1e-4
            )


def same_but_for_ties(
    plain: dict[str, Any], result: dict[str, Any], gap: float
) -> None:
    """The same tokens, up to where plain vLLM's two likeliest lay within `gap`.

    `plain` has logprobs of its greedy outputs.
    """
    for one, other in zip(plain["outputs"], result["outputs"], strict=True):
        pairs = enumerate(zip(one["tokens"], other["tokens"], strict=True))
        parting = next((i for i, (a, b) in pairs if a != b), None)
        if parting is not None:
            likely = dict(one["logprobs"][parting])
            a, b = (likely[o["tokens"][parting]] for o in (one, other))
            assert a - b < gap


def bigrams_are_drafted(engines: Engines) -> None:
    """Where the text tells nothing, what the model says after the root is drafted.

    A prompt of one token t continues as a, b. The draft after a is what a continues as
    behind a comma, as prompts begin with no token of their own: accepted if, and only
    if, that is b.
    """
    tokens = range(2, 97)
    alone, behind = [[t] for t in tokens], [[COMMA, t] for t in tokens]
    jobs = in_batches([request(p, max_tokens=3) for p in [*alone, *behind]], 4)
    results = engines.run(jobs, model=SURE)["outputs"]
    outputs = [output["tokens"] for output in results]
    after = dict(zip(tokens, outputs, strict=False))
    drafted = dict(zip(tokens, outputs[len(tokens) :], strict=True))
    new = {t: (a, b) for t, (a, b, _) in after.items() if a != t and a in after}
    hits = [t for t, (a, b) in new.items() if drafted[a][0] == b][:6]
    misses = [t for t, (a, b) in new.items() if drafted[a][0] != b][:6]
    assert len(hits) > 2 and len(misses) > 2
    wanted = [request([t], max_tokens=3) for t in hits]
    wanted += [request([t], max_tokens=2) for t in misses]
    sizes = {"window_size": 0, "ngram_size": 2, "verification_set_size": 1}
    sizes["node_budget"] = 2  # fed whatever it costs
    result = same_as_plain(engines, in_batches(wanted, 4), sizes, model=SURE)
    assert result["metrics"][ACCEPTED] == len(hits)
    assert result["metrics"][DRAFTS] == len(wanted)


def budgets_of_nodes(engines: Engines) -> None:
    """Of the server, and of requests: with a window that then has no room, and none."""
    texts = [(p * 9)[:20] for p in prompts(4, seed=50, longest=4)]
    for sizes in (SMALL, {**SMALL, "window_size": 0, "node_budget": 6}):
        own = [{}, *({"lookahead_node_budget": n} for n in (5, 2, 1))]
        batch = [
            request(text, max_tokens=16, extra_args=extra)
            for text, extra in zip(texts, own, strict=True)
        ]
        result = same_as_plain(engines, [batch], sizes)
        assert result["metrics"][ACCEPTED] > 0
