# SPDX-License-Identifier: Apache-2.0
"""What the n-gram pool finds, in which order, and whose it is."""

import pytest

from tests.core.build import (
    Row,
    ints,
    make_batch,
    make_pages,
    put_in_ring,
    write,
)
from vllm_lookahead.core.draft import pool
from vllm_lookahead.core.draft.pool import ENTRIES_PER_CANDIDATE, MAX_CONTEXT
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.reference import ReferenceOps

X = 99  # the root
G, N = 4, 4


def candidates(pages: BlockPages, row: Row, g: int = G) -> list[list[int]]:
    """The chains that may follow a request's root, best first."""
    (request,) = make_batch([row]).requests()
    return pool.lookup(pages, request, g)


def request(pages: BlockPages, blocks: list[int], text: list[int], **sizes) -> Row:
    """A request whose prompt is `text` without its last token, the root."""
    write(ReferenceOps(), pages, blocks, text[:-1])
    n = pages.window.shape[1] + 1
    return Row(blocks, len(text) - 1, text[-1], **{"n": n, **sizes})


def history(*parts: list[int]) -> list[int]:
    return [token for part in parts for token in part]


def test_nothing_known_nothing_drafted():
    pages = make_pages(2, 16, 0, N)
    assert candidates(pages, request(pages, [0], [1, 2, 3, X])) == []


def test_every_position_of_the_history_is_an_ngram():
    pages = make_pages(2, 16, 0, N)
    text = [1, X, 11, 12, 13, 14, 2, X, 21, 22, 23, 3, X]
    found = candidates(pages, request(pages, [1], text))
    assert found == [[21, 22, 23], [11, 12, 13]]


def test_longer_agreement_wins_then_the_newest():
    pages = make_pages(4, 16, 0, N)
    text = history(
        [7, 8, 9, X, 11, 0, 0],  # agrees on three tokens before the key
        [6, 8, 9, X, 22, 0, 0],  # on two
        [6, 6, 9, X, 33, 0, 0],  # on one
        [6, 8, 9, X, 44, 0, 0],  # on two, newer
        [6, 6, 6, X, 55, 0, 0],  # on none
        [7, 8, 9, X],
    )
    row = request(pages, [3, 0, 2], text, g=5)
    found = candidates(pages, row, 5)
    assert [chain[0] for chain in found] == [11, 44, 22, 33, 55]


def test_agreement_counts_at_most_max_context_tokens():
    pages = make_pages(4, 16, 0, N)
    suffix = list(range(10, 10 + MAX_CONTEXT + 2))
    text = history(suffix, [X, 1], suffix[1:], [X, 2], suffix, [X])
    found = candidates(pages, request(pages, [0, 1, 2], text))
    # Beyond MAX_CONTEXT they are equals: the newest wins.
    assert [chain[0] for chain in found] == [2, 1]


def test_a_chain_may_run_into_the_root():
    pages = make_pages(1, 16, 0, N)
    found = candidates(pages, request(pages, [0], [3, X, 4, X]))
    assert found == [[4, X]]
    repeated = request(pages, [0], [X, X, X, X])
    assert candidates(pages, repeated) == [[X], [X, X], [X, X, X]]


def test_a_chain_ends_where_the_history_is_unknown():
    """A block whose tokens nobody recorded, e.g. one loaded from elsewhere."""
    pages = make_pages(3, 16, 0, N)
    write(ReferenceOps(), pages, [0], [*range(20, 35), X])
    write(ReferenceOps(), pages, [2], [1, 2, 3, 4])
    assert candidates(pages, Row([0, 1, 2], 36, X)) == []
    pages.tokens[1, 0], pages.tokens[1, 2] = 8, 9
    assert candidates(pages, Row([0, 1, 2], 36, X)) == [[8]]


def test_unknown_tokens_agree_with_nothing():
    pages = make_pages(2, 16, 0, N)
    text = [1, EMPTY, X, 11, 12, 13, 2, 3, X, 21, 22, 23, 1, EMPTY]
    write(ReferenceOps(), pages, [1], text)
    found = candidates(pages, Row([1], len(text), X))
    assert found == [[21, 22, 23], [11, 12, 13]]


@pytest.mark.parametrize("extra", [0, 1])
def test_a_few_entries_per_candidate_are_looked_at(extra):
    """The oldest of all n-grams is found only while few repeat themselves."""
    pages = make_pages(10, 16, 0, 2)
    repeats = G * ENTRIES_PER_CANDIDATE - 1 + extra
    text = history([X, 11], [X, 22] * repeats, [X])
    found = candidates(pages, request(pages, [*range(10)], text, n=2))
    assert found == ([[22]] if extra else [[22], [11]])


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_ngrams_across_block_borders(block_size, n):
    """The n-gram at every offset, through a block table in no order."""
    table = [4, 1, 5, 0]
    for at in range(1, 2 * block_size + 2):
        pages = make_pages(6, block_size, 0, n)
        text = list(range(200, 200 + 3 * block_size + 5))
        text[at], text[at - 1], text[-1] = X, 7, X
        text[-2] = 7
        found = candidates(pages, request(pages, table, text))
        assert found == [text[at + 1 : at + n]]


def test_no_chain_is_a_prefix_of_an_earlier_one():
    pages = make_pages(2, 16, 2, N)
    put_in_ring(
        pages,
        0,
        [
            (9, X, 1, 2, 3),  # oldest
            (9, X, 1, 2),
            (9, X, 1, 2, 4),
            (9, X, 6),
            (9, X, 6, 7),
            (9, X, 1, 2, 4),  # newest
        ],
    )
    pages.tokens[0, :2] = ints([8, 9])
    found = candidates(pages, Row([0], 2, X))
    assert found == [[1, 2, 4], [6, 7], [1, 2, 3]]
    # A longer one is new: it says more.
    put_in_ring(pages, 0, [(9, X, 6, 7), (9, X, 6)])
    tree = ReferenceOps.propose(pages, make_batch([Row([0], 2, X)]), G)
    assert tree.tokens[0, :3].tolist() == [X, 6, 7]


@pytest.mark.parametrize("g", range(G + 1))
@pytest.mark.parametrize("n", range(2, N + 1))
def test_each_request_has_its_own_limits(n, g):
    pages = make_pages(4, 16, 0, N)
    text = history(*([i, X, 10 * i, 10 * i + 1, 10 * i + 2] for i in range(1, 7)))
    row = request(pages, [2, 3], [*text, 0, X], n=n, g=g)
    found = candidates(pages, row)
    newest_first = [6, 5, 4, 3][:g]
    wanted = [[10 * i, 10 * i + 1, 10 * i + 2][: n - 1] for i in newest_first]
    assert found == wanted
