# SPDX-License-Identifier: Apache-2.0
"""Which blocks a step gives out, and under which salt."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm_lookahead.core.corpus import NO_SALT, NOBODY, salt_of
from vllm_lookahead.engine.corpus import given_out
from vllm_lookahead.engine.outputs import GivenOut
from vllm_lookahead.params import LookaheadParams

SERVER = LookaheadParams(0, 4, 2, pool_scope="salt")


def scheduled(
    new: list[tuple[str, list[int], int]],
    cached: list[tuple[str, list[int] | None, int]],
    resumed: set[str],
) -> Any:
    """A step of (request id, its blocks or new ones, tokens computed)."""
    ids, blocks, computed = zip(*cached, strict=True)
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=r, block_ids=(b,), num_computed_tokens=n)
            for r, b, n in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(ids),
            new_block_ids=[b and (b,) for b in blocks],
            num_computed_tokens=list(computed),
            resumed_req_ids=resumed,
        ),
    )


def request(salt: str | None, **extra: Any) -> Any:
    sampling = SimpleNamespace(extra_args=extra)
    return SimpleNamespace(cache_salt=salt, sampling_params=sampling)


def test_all_new_blocks_and_none_that_were_found() -> None:
    output = scheduled(
        [("a", [1, 2, 3], 32), ("b", [4], 0)],
        [("c", [5], 70), ("d", None, 90), ("e", [6, 7, 8], 16)],
        resumed={"e"},
    )
    requests = {
        "a": request("red"),
        "b": request(None),
        "c": request("red", lookahead_ngram_size=2),
        "d": request("red"),
        "e": request("blue"),
    }
    red, blue = salt_of("red"), salt_of("blue")
    assert given_out(output, requests, SERVER, 16) == GivenOut(
        [3, 4, 5, 7, 8],
        [red, NO_SALT, red, blue, blue],
        {"a": red, "b": NO_SALT},
    )


def test_who_shares_nothing() -> None:
    output = scheduled(
        [("a", [1], 0), ("b", [2], 0)], [("pooling", [3], 0)], resumed=set()
    )
    requests = {
        "a": request("red", lookahead=0),
        "b": request("red", lookahead_pool_scope="request"),
        "pooling": SimpleNamespace(cache_salt="red", sampling_params=None),
    }
    assert given_out(output, requests, SERVER, 16) == GivenOut(
        [1, 2, 3], [NOBODY] * 3, {"a": NOBODY, "b": NOBODY}
    )
    own = replace(SERVER, pool_scope="request")
    assert given_out(output, requests, own, 16) is None
