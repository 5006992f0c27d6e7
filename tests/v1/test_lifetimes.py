# SPDX-License-Identifier: Apache-2.0
"""Requests that end early, are preempted, fill the context, or share blocks."""

from typing import Any

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, TIGHT, prompts, request, same_as_plain
from tests.v1.test_lossless import FULL

LOOP = [20, 21, 22, 23, 24] * 8
PREEMPTIONS = "vllm:num_preemptions"
SEEDED = {"temperature": 0.7, "seed": 3}


@pytest.mark.parametrize("options", [{}, TIGHT], ids=["roomy", "tight"])
def test_abort(engines: Engines, options: dict[str, int]) -> None:
    """Two of four are aborted at work; the others and those after them are right."""
    texts = [LOOP, *(list(range(i, i + 30)) for i in (2, 40, 60))]
    own: list[dict[str, Any]] = [{}, {}, SEEDED, SEEDED]
    whole = [request(t, max_tokens=50, **o) for t, o in zip(texts, own, strict=True)]
    cut = [whole[0] | {"abort_after": 12}, whole[1]]
    cut += [whole[2] | {"abort_after": 7}, whole[3]]
    later = [request(t, max_tokens=40) for t in prompts(4, seed=52)]
    plain = engines.run([whole, whole, later])["outputs"]

    result = engines.run([cut, whole, later], FULL, **options)

    outputs = result["outputs"]
    for i, (one, other) in enumerate(zip(plain, outputs, strict=True)):
        count = len(other["tokens"])
        if i in (0, 2):
            assert cut[i]["abort_after"] <= count < 50
        else:
            assert count == len(one["tokens"])
        assert other["tokens"] == one["tokens"][:count]
    assert result["usage"] == [0, 0, 0], "blocks that nobody gave back"
    assert result["metrics"][ACCEPTED] > 0
    assert (result["metrics"][PREEMPTIONS] > 0) == bool(options)


def test_preemption_of_unlike_requests(engines: Engines) -> None:
    """What was preempted goes on where it was, drafting or not."""
    texts = [list(range(i, i + 20 + i // 4)) for i in (2, 20, 40, 60, 70, 10)]
    own: list[dict[str, Any]] = [{}, {"extra_args": {"lookahead": 0}}, SEEDED]
    requests = zip(texts, own * 2, strict=True)
    jobs = [[request(t, max_tokens=50, **o) for t, o in requests]] * 2
    plain = engines.run(jobs)["outputs"]
    result = engines.run(jobs, FULL, **TIGHT)
    assert [o["tokens"] for o in result["outputs"]] == [o["tokens"] for o in plain]
    assert result["metrics"][PREEMPTIONS] > 1
    assert result["usage"] == [0, 0]


def test_cache_salt(engines: Engines) -> None:
    """N-grams are found where blocks are shared: under the salt that wrote them.

    The cache holds 8 blocks and each text takes 3, so blocks change hands.
    """
    first = request(LOOP, max_tokens=50, salt="a")
    text = LOOP + engines.run([[first]])["outputs"][0]["tokens"][:40]

    def follow_up(salt: str | None) -> list[dict[str, Any]]:
        return [request(text, max_tokens=10, salt=salt, watch=True)]

    jobs = [[first], follow_up("b"), follow_up("a"), follow_up(None), follow_up("c")]
    result = engines.run(jobs, FULL, **TIGHT)

    assert [o["cached"] for o in result["outputs"]] == [0, 0, 64, 0, 0]
    other, same, none, another = (o["ngrams"] for o in result["outputs"][1:])
    assert same > 0
    assert (other, none, another) == (0, 0, 0)
    expected = engines.run([[request(text, max_tokens=10)]])["outputs"][0]["tokens"]
    assert all(o["tokens"] == expected for o in result["outputs"][1:])


def test_full_context(engines: Engines) -> None:
    """Whole n-grams are accepted right up to the last position."""
    size = TIGHT["max_model_len"]
    texts = [(LOOP * 3)[:n] for n in (size - 1, size - 2, size - 5, 40, 41, 42, 43)]
    jobs = [[request(t, max_tokens=200)] for t in texts]
    jobs.append([request(t, max_tokens=200) for t in texts[1:5]])
    jobs.append([request(LOOP, max_tokens=20)])
    result = same_as_plain(engines, jobs, FULL, **TIGHT)
    filled = zip(texts + texts[1:5], result["outputs"][:-1], strict=True)
    assert {len(t) + len(o["tokens"]) for t, o in filled} == {size}
    assert result["metrics"][ACCEPTED] > 100
