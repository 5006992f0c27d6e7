# SPDX-License-Identifier: Apache-2.0
"""What the n-gram pool finds, in which order, and whose it is."""

import random

import pytest

from tests.core.build import (
    Row,
    ints,
    make_batch,
    make_pages,
    nodes_of,
    put_in_ring,
    write,
)
from tests.core.plain_python import draft_tree, lookup, until_empty
from vllm_lookahead.core import pool
from vllm_lookahead.core.ops import TorchOps
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.pool import ENTRIES_PER_CANDIDATE, MAX_CONTEXT

X = 99  # the root
G, N = 4, 4


def candidates(pages: BlockPages, row: Row, g: int = G) -> list[list[int]]:
    """The chains that may follow a request's root, best first."""
    (chains,) = pool.lookup(pages, make_batch([row]), g).tolist()
    return [until_empty(chain) for chain in chains if chain[0] != EMPTY]


def request(pages: BlockPages, blocks: list[int], text: list[int], **sizes) -> Row:
    """A request whose prompt is `text` without its last token, the root."""
    write(TorchOps(), pages, blocks, text[:-1])
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
    write(TorchOps(), pages, [0], [*range(20, 35), X])
    write(TorchOps(), pages, [2], [1, 2, 3, 4])
    assert candidates(pages, Row([0, 1, 2], 36, X)) == []
    pages.tokens[1, 0], pages.tokens[1, 2] = 8, 9
    assert candidates(pages, Row([0, 1, 2], 36, X)) == [[8]]


def test_unknown_tokens_agree_with_nothing():
    pages = make_pages(2, 16, 0, N)
    text = [1, EMPTY, X, 11, 12, 13, 2, 3, X, 21, 22, 23, 1, EMPTY]
    write(TorchOps(), pages, [1], text)
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
    tree = TorchOps.propose(pages, make_batch([Row([0], 2, X)]), G)
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


@pytest.mark.parametrize("seed", range(60))
def test_random_pools_against_plain_python(seed):
    """Histories and rings of few tokens, so that nearly everything agrees."""
    rng = random.Random(seed)
    w, n, g = rng.randint(0, 3), rng.randint(2, 6), rng.randint(0, 6)
    size, vocab = rng.choice([4, 16]), rng.randint(1, 4)
    pages = make_pages(13, size, w, n)
    blocks = rng.sample(range(13), 13)
    rows = []
    for _ in range(3):
        table = [blocks.pop() for _ in range(4)]
        length = rng.choice([1, size, size + 1, 2 * size, rng.randint(1, 4 * size - 1)])
        text = [rng.randrange(vocab) for _ in range(length + 1)]
        rows.append(
            request(pages, table, text, n=rng.randint(2, n), g=rng.randint(0, g))
        )
        for block in table if w else ():
            grams = [
                [rng.randrange(vocab) for _ in range(rng.randint(2, n + 1))]
                for _ in range(rng.randint(0, pages.ring.shape[1]))
            ]
            put_in_ring(pages, block, grams)
            # The ring has turned: the same n-grams, begun at another cell.
            turn = rng.randint(0, 9) if len(grams) == pages.ring.shape[1] else 0
            pages.ring[block] = pages.ring[block].roll(turn, 0)
            pages.ring_count[block] += turn
    if rng.random() < 0.3:
        pages.tokens[:, rng.randrange(size)] = EMPTY  # never recorded

    tree = TorchOps.propose(pages, make_batch(rows, filler=blocks[0]), g)

    for row, nodes in zip(rows, nodes_of(tree), strict=True):
        chains = lookup(pages, row, g)
        assert nodes == draft_tree(row, chains, [])
