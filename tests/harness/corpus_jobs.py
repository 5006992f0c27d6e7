# SPDX-License-Identifier: Apache-2.0
"""Requests of several salts, and what they read of each other: for both engines."""

import itertools
from typing import Any

from tests.harness.engines import Engines
from tests.harness.jobs import (
    ACCEPTED,
    SMALL,
    TIGHT,
    in_batches,
    prompts,
    request,
    same_as_plain,
)

SHARED = SMALL | {"pool_scope": "salt"}
LENGTH = 6
ALONE = {"extra_args": {"lookahead_pool_scope": "request"}}


def is_part(tokens: list[int], text: list[int]) -> bool:
    ends = range(len(tokens), len(text) + 1)
    return any(text[end - len(tokens) : end] == tokens for end in ends)


def salts_never_meet(engines: Engines) -> None:
    """All that is read was said under the same salt, while blocks change hands.

    The cache holds 8 blocks, and each text takes two. A step that was scheduled before
    its request ended leaves some more tokens than the output has.
    """
    owners: list[tuple[str | None, dict[str, Any]]] = [(None, {})] * 2
    owners += [("a", {})] * 2 + [("b", {}), ("b", {"seed": 1}), ("a", ALONE)]
    texts = [(text * 30)[:30] for text in prompts(9, seed=70)]
    requests = []
    for text, (salt, own) in zip(texts, itertools.cycle(owners), strict=False):
        sampled = {"temperature": 0.7} if "seed" in own else {}
        requests.append(request(text, salt=salt, max_tokens=LENGTH, **own, **sampled))
    longer = [
        r | {"params": r["params"] | {"max_tokens": 2 * LENGTH}} for r in requests
    ]
    plain = engines.run(in_batches(longer, 3), **TIGHT)["outputs"]
    jobs = in_batches(requests, 3)
    result = engines.run(jobs, SHARED, watch="corpus", **TIGHT)

    read = result["watched"]["read"]
    both = list(zip(requests, result["outputs"], strict=True))
    said = [r["prompt"] + o["tokens"] for r, o in zip(requests, plain, strict=True)]
    for one, other in zip(plain, result["outputs"], strict=True):
        assert other["tokens"] == one["tokens"][:LENGTH]
    readers = set()
    for number, (own, output) in enumerate(both):
        others = [
            text
            for i, (other, text) in enumerate(zip(requests, said, strict=True))
            if other.get("salt") == own.get("salt") and i != number
            if "extra_args" not in other["params"]
        ]
        blocks = [block for block in read[output["name"]] if block]
        for block in blocks:
            assert any(is_part(block, text) for text in others), (number, block)
        if blocks:
            readers.add(own.get("salt"))
            assert "extra_args" not in own["params"]
    assert readers == {None, "a", "b"}


def others_are_drafted(engines: Engines, watch: bool = False) -> None:
    """What was said before is accepted, where the same is asked for again.

    A block is full then, and stays in the cache; the prompt has none of its own.
    """
    text = prompts(1, seed=73)[0]
    jobs = [[request(text, max_tokens=24, temperature=0.9, seed=5)]] * 2
    alone = engines.run(jobs, SMALL)["metrics"][ACCEPTED]
    result = same_as_plain(engines, jobs, SHARED, watch=watch)
    assert not (result["watched"] or {}).get("waits")
    assert result["metrics"][ACCEPTED] > alone + 3
