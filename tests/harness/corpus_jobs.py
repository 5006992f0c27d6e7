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
ALONE = {"extra_args": {"lookahead_pool_scope": "request"}}


def is_part(tokens: list[int], text: list[int]) -> bool:
    ends = range(len(tokens), len(text) + 1)
    return any(text[end - len(tokens) : end] == tokens for end in ends)


def salts_never_meet(engines: Engines) -> None:
    """All that is read was said under the same salt, while blocks change hands.

    The cache holds 8 blocks, and each text takes two.
    """
    owners: list[tuple[str | None, dict[str, Any]]] = [(None, {})] * 2
    owners += [("a", {})] * 2 + [("b", {}), ("b", {"seed": 1}), ("a", ALONE)]
    texts = [(text * 40)[:36] for text in prompts(12, seed=70)]
    requests = []
    for text, (salt, own) in zip(texts, itertools.cycle(owners), strict=False):
        sampled = {"temperature": 0.7} if "seed" in own else {}
        requests.append(request(text, salt=salt, max_tokens=9, **own, **sampled))
    jobs = in_batches(requests, 3)
    result = same_as_plain(engines, jobs, SHARED, watch="corpus", **TIGHT)

    read = result["watched"]["read"]
    both = list(zip(requests, result["outputs"], strict=True))
    said = [own["prompt"] + output["tokens"] for own, output in both]
    readers = set()
    for number, (own, output) in enumerate(both):
        others = [
            text
            for i, (other, text) in enumerate(zip(requests, said, strict=True))
            if other.get("salt") == own.get("salt") and i != number
            if "extra_args" not in other["params"]
        ]
        blocks = [block for block in read[output["name"]] if block]
        assert all(any(is_part(block, text) for text in others) for block in blocks)
        if blocks:
            readers.add(own.get("salt"))
            assert "extra_args" not in own["params"]
    assert readers == {None, "a", "b"}


def others_are_drafted(engines: Engines) -> None:
    """What was said before is accepted, where the same is asked for again."""
    text = prompts(1, seed=71)[0]
    jobs = [[request(text, max_tokens=20)], [request(text, max_tokens=20)]]
    options = {"enable_prefix_caching": False}
    alone = engines.run(jobs, SMALL, **options)["metrics"][ACCEPTED]
    shared = same_as_plain(engines, jobs, SHARED, **options)["metrics"][ACCEPTED]
    assert shared > alone
