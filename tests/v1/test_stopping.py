# SPDX-License-Identifier: Apache-2.0
"""Wherever in an accepted n-gram generation ends, it ends as plain vLLM's does."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, DRAFTS, prompts, request, same_as_plain
from tests.v1.test_lossless import TREE

EOS = 1
# A period of five tokens that no model of the tests leaves soon.
LOOP = [20, 21, 22, 23, 24] * 8


def loops(engines: Engines) -> list[list[int]]:
    """Prompts whose greedy continuation accepts whole n-grams."""
    texts = [LOOP, *prompts(3, seed=31)]
    result = engines.run([[request(t, max_tokens=60)] for t in texts], TREE)
    assert result["metrics"][ACCEPTED] > 60
    return [t + o["tokens"][:30] for t, o in zip(texts, result["outputs"], strict=True)]


@pytest.mark.parametrize("lookahead", [TREE, {}], ids=["tree", "default"])
def test_max_tokens_at_each_index(engines: Engines, lookahead: dict[str, int]) -> None:
    jobs = [[request(t, max_tokens=n) for n in range(1, 13)] for t in loops(engines)]
    result = same_as_plain(engines, jobs, lookahead)
    assert [len(o["tokens"]) for o in result["outputs"][:12]] == list(range(1, 13))


def first_ends(text: list[int], generated: int, n: int) -> list[int]:
    """Where a token is that the n before it are not, all of it said before.

    Args:
        text: a prompt and its continuation.
        generated: tokens of the latter.
        n: tokens before and after that were said in the same order.
    """

    def was_said(said: list[int]) -> bool:
        starts = range(len(text) - generated, len(text) - len(said) + 1)
        return sum(text[k : k + len(said)] == said for k in starts) > 1

    places = range(len(text) - generated + 2 * n, len(text) - n)
    return [
        at
        for at in places
        if text[at] not in text[at - n : at] and was_said(text[at - n : at + n + 1])
    ]


def ends_at(
    engines: Engines, n: int, sampling: dict[str, float]
) -> tuple[int, list[dict[str, Any]]]:
    """A token, and requests whose output has it first at index 0, 1, ..., n."""
    # Two that this model goes on with in a loop of more than n tokens.
    texts = [prompts(64, seed=100)[i] for i in (13, 39)]
    outputs = engines.run([[request(t, max_tokens=120) for t in texts]])["outputs"]
    places = [
        (text + output["tokens"], at)
        for text, output in zip(texts, outputs, strict=True)
        for at in first_ends(text + output["tokens"], 120, n)
    ]
    text, at = places[-1]
    seeds = [{"seed": seed} for seed in range(8)] if sampling else [{}]
    found = []
    for i in range(n + 1):
        jobs = [[request(text[: at - i], **sampling, **seed) for seed in seeds]]
        outputs = engines.run(jobs)["outputs"]
        heads = [output["tokens"][: n + 1] for output in outputs]
        found.append(jobs[0][heads.index(text[at - i :][: n + 1])])
    return text[at], found


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.02}], ids=["greedy", "seeded"]
)
def test_eos_at_each_index(
    engines: Engines, tmp_path: Path, sampling: dict[str, float]
) -> None:
    """Of the prefill, of a whole n-gram that one step accepts, and of the bonus."""
    n = TREE["ngram_size"]
    end, requests = ends_at(engines, n, sampling)
    eos = json.dumps({"eos_token_id": [EOS, end]})
    (tmp_path / "generation_config.json").write_text(eos)
    options = {"generation_config": str(tmp_path)}
    for i, goes_on in enumerate(requests):
        params = goes_on["params"] | {"ignore_eos": False}
        ends = [[request(goes_on["prompt"], **params)]]
        ahead = same_as_plain(engines, [[goes_on]], TREE, **options)["outputs"][0]
        result = same_as_plain(engines, ends, TREE, **options)
        assert ahead["tokens"].index(end) == i
        assert (len(ahead["tokens"]), ahead["reason"]) == (12, "length")
        ended = {"tokens": ahead["tokens"][: i + 1], "reason": "stop"}
        assert result["outputs"][0] == result["outputs"][0] | ended
        # One step emitted all tokens but the first, which is the prefill's.
        assert result["metrics"].get(DRAFTS, 0) == (i > 0)
        assert result["metrics"].get(ACCEPTED, 0) == (n - 1 if i else 0)


@pytest.mark.parametrize("lookahead", [TREE, {}], ids=["tree", "default"])
def test_stop_tokens(engines: Engines, lookahead: dict[str, int]) -> None:
    jobs = []
    for text in loops(engines):
        ahead = engines.run([[request(text)]])["outputs"][0]["tokens"]
        jobs.append([request(text, stop_token_ids=[t]) for t in ahead])
        jobs.append([request(text, stop_token_ids=[t, 3], min_tokens=4) for t in ahead])
    same_as_plain(engines, jobs, lookahead)


def test_second_eos_id(engines: Engines, tmp_path: Path) -> None:
    """Every id of a list of EOS ids ends a request, and none under ignore_eos."""
    text = loops(engines)[0]
    ahead = engines.run([[request(text)]])["outputs"][0]["tokens"]
    for eos in ([EOS, ahead[2]], [ahead[3], EOS]):
        job = [[request(text, ignore_eos=False), request(text, ignore_eos=True)]]
        folder = tmp_path / str(eos[0])
        folder.mkdir()
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": eos})
        )
        result = same_as_plain(engines, job, TREE, generation_config=str(folder))
        ended, ignored = result["outputs"]
        assert ended["reason"] == "stop"
        assert len(ended["tokens"]) <= 4
        assert ignored["reason"] == "length"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "seed": 3}], ids=str)
def test_stop_strings(engines: Engines, sampling: dict[str, Any]) -> None:
    """Of the letters on both sides of each border between two tokens."""
    text = loops(engines)[0]
    (goes_on,) = engines.run([[request(text, **sampling)]])["outputs"]
    said = [chr(30 + t) if t < 97 else f"<{t}>" for t in goes_on["tokens"]]
    assert goes_on["text"] == "".join(said)
    stops = [a[-1] + b[0] for a, b in zip(said, said[1:], strict=False)]
    jobs = [[request(text, stop=[stop], **sampling) for stop in stops]]
    outputs = same_as_plain(engines, jobs, TREE)["outputs"]
    for output, stop in zip(outputs, stops, strict=True):
        assert (output["reason"], output["stop"]) == ("stop", stop)
        assert output["text"] == goes_on["text"].split(stop)[0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_prompts(engines: Engines, length: int) -> None:
    jobs = [[request([7 + i] * length, max_tokens=20)] for i in range(3)]
    same_as_plain(engines, jobs, TREE)
