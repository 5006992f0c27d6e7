# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from vllm_lookahead.params import LookaheadParams, check_range, request_params

SERVER = LookaheadParams(window_size=15, ngram_size=5, verification_set_size=10)


@pytest.mark.parametrize(
    ("window", "ngram", "candidates", "nodes"),
    [(15, 5, 15, 120), (1, 2, 1, 2), (0, 6, 3, 16), (5, 4, 0, 15), (0, 5, 0, 1)],
)
def test_tree_size(window: int, ngram: int, candidates: int, nodes: int) -> None:
    assert LookaheadParams(window, ngram, candidates).max_tree_size == nodes


@pytest.mark.parametrize(
    ("budget", "candidates", "nodes"),
    [(1, 0, 1), (2, 1, 2), (40, 39, 40), (200, 60, 120)],
)
def test_a_budget_bounds_the_tree(budget: int, candidates: int, nodes: int) -> None:
    params = LookaheadParams(15, 5, 15, budget)
    assert params.max_candidate_nodes == candidates
    assert params.max_tree_size == nodes


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((65, 5, 1), "window_size=65 is not allowed: .* from 0 to 64"),
        ((1, 1, 1), "ngram_size=1 is not allowed: .* from 2 to 16"),
        ((1, 5, -1), "verification_set_size=-1 is not allowed: .* from 0 to 64"),
        (("5", 5, 1), "window_size='5' is not allowed"),
        ((64, 16, 64), "draft tree of 1920 tokens; at most 512"),
        ((64, 16, 64, 9), "draft tree of 1920 tokens; at most 512"),
        ((1, 5, 1, 0), "node_budget=0 is not allowed: .* from 1 to 512"),
        ((1, 5, 1, 9, "all"), "pool_scope='all' is not allowed: .* request or salt"),
    ],
)
def test_bad_sizes_are_named(sizes: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LookaheadParams(*sizes)


@pytest.mark.parametrize("value", [3, 3.0])
def test_whole_numbers_pass(value: float) -> None:
    assert check_range("x", value, 0, 5) == 3


@pytest.mark.parametrize("value", [2.5, "3", None, [3], float("nan"), float("inf")])
def test_other_values_do_not(value: object) -> None:
    with pytest.raises(ValueError, match="^x=.* must be a whole number from 0 to 5$"):
        check_range("x", value, 0, 5)


@pytest.mark.parametrize(
    "extra_args", [None, {}, {"lookahead": 1}, {"lookahead": True}, {"other": "x"}]
)
def test_a_request_gets_the_servers_sizes(extra_args: dict | None) -> None:
    assert request_params(extra_args, SERVER) is SERVER


@pytest.mark.parametrize("off", [0, False, 0.0])
def test_a_request_can_switch_off(off: object) -> None:
    assert request_params({"lookahead": off}, SERVER) is None


def test_a_request_shares_what_the_server_shares_or_nothing() -> None:
    server = replace(SERVER, pool_scope="salt")
    assert request_params({"lookahead_ngram_size": 5}, server) == server
    assert request_params({"lookahead_pool_scope": "salt"}, server) == server
    assert request_params({"lookahead_pool_scope": "request"}, server) == SERVER
    assert request_params({"lookahead_pool_scope": "request"}, SERVER) == SERVER


def test_a_request_can_ask_for_less() -> None:
    asked = {"lookahead_window_size": 5, "lookahead_verification_set_size": 10.0}
    assert request_params(asked, SERVER) == LookaheadParams(5, 5, 10)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"lookahead": 2}, "lookahead=2 is not allowed: .* from 0 to 1"),
        ({"lookahead": "yes"}, "lookahead='yes' is not allowed"),
        ({"lookahead_window_size": 16}, "lookahead_window_size=16 .* from 0 to 15"),
        ({"lookahead_ngram_size": 1}, "lookahead_ngram_size=1 .* from 2 to 5"),
        ({"lookahead_window": 5}, "unknown option lookahead_window=5: use one of"),
        (
            {"lookahead_pool_scope": "salt"},
            "lookahead_pool_scope='salt' is not allowed: .* start it with pool_scope=",
        ),
        (
            {"lookahead_pool_scope": 1},
            "lookahead_pool_scope=1 is not allowed: it must be request or salt",
        ),
        # A request that is off is still read.
        ({"lookahead": 0, "lookahead_ngram_size": 9}, "lookahead_ngram_size=9"),
    ],
)
def test_bad_requests_are_refused(extra_args: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        request_params(extra_args, SERVER)
