# SPDX-License-Identifier: Apache-2.0
"""What is found in a request's pages, and that it is the nearest, then the newest."""

import random

import pytest

from tests.core.build import (
    Row,
    candidates,
    ints,
    make_pages,
    put_answers,
    put_in_ring,
    write,
)
from tests.core.plain_python import chances_of, followed
from vllm_lookahead.core.draft import index
from vllm_lookahead.core.draft.estimate import FLOOR, WEIGHTS
from vllm_lookahead.core.draft.index import MAX_CELLS, MIN_CELLS, num_cells
from vllm_lookahead.core.pages import CONTEXT, EMPTY, REACH, BlockPages
from vllm_lookahead.core.reference import ReferenceOps

X = 99  # the root
N = 4


def request(pages: BlockPages, blocks: list[int], text: list[int], **sizes) -> Row:
    """A request whose prompt is `text` without its last token, the root."""
    write(ReferenceOps(), pages, blocks, text[:-1])
    sizes = {"n": pages.ngram_size} | sizes
    return Row(blocks, len(text) - 1, text[-1], **sizes)


def history(*parts: list[int]) -> list[int]:
    return [token for part in parts for token in part]


def longest(ops, pages: BlockPages, row: Row) -> tuple[int, ...]:
    """The one chain that a request's text alone gives."""
    branches = sorted(candidates(ops, pages, row), key=len)
    chain = branches[-1] if branches else ()
    assert branches == [chain[:k] for k in range(1, len(chain) + 1)]
    return chain


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch):
    """Sets how many cells a table has."""

    def set_cells(count: int) -> None:
        for module, name in [
            (index, "MIN_CELLS"),
            (index, "MAX_CELLS"),
            (index, "MIN_ANSWER_CELLS"),
            (index, "MAX_ANSWER_CELLS"),
        ]:
            monkeypatch.setattr(module, name, count)

    return set_cells


def test_nothing_known_nothing_drafted(ops):
    pages = make_pages(2, 16, 0, N)
    assert not candidates(ops, pages, request(pages, [0], [1, 2, 3, X]))


def test_every_position_of_the_history_is_an_ngram(ops):
    pages = make_pages(2, 16, 0, N)
    text = [1, X, 11, 12, 13, 14, 2, X, 21, 22, 23, 3, X]
    assert longest(ops, pages, request(pages, [1], text)) == (21, 22, 23)
    assert longest(ops, pages, request(pages, [1], [*text[:7], X])) == (11, 12, 13)


def test_longer_agreement_wins_then_the_newest(ops):
    parts = [
        [8, 9, X, 11, 0, 0],  # three tokens agree
        [6, 9, X, 22, 0, 0],  # two
        [6, 9, X, 33, 0, 0],  # two, newer
        [6, 6, X, 44, 0, 0],  # one
        [6, 6, X, 55, 0, 0],  # one, newer
    ]
    for oldest, first in enumerate([11, 33, 33, 55, 55]):
        pages = make_pages(4, 16, 0, N)
        text = history(*parts[oldest:], [8, 9, X])
        assert longest(ops, pages, request(pages, [3, 0, 2], text))[0] == first


def test_agreement_counts_at_most_context_tokens(ops):
    pages = make_pages(4, 16, 0, N)
    suffix = list(range(10, 10 + CONTEXT + 2))
    text = history(suffix, [X, 1], suffix[3:], [X, 2], suffix, [X])
    # Beyond CONTEXT they are equals: the newest wins.
    assert longest(ops, pages, request(pages, [0, 1, 2], text))[0] == 2


def test_of_many_places_the_oldest_is_found_that_agrees(ops):
    pages = make_pages(40, 16, 0, N)
    text = [1, 2, X, 20, *[X, 21] * 250, 1, 2, X]
    assert longest(ops, pages, request(pages, [*range(40)], text))[0] == 20


def test_agreement_goes_on_along_the_draft(ops):
    """4, 5 was followed by 6, and 5 alone by 7."""
    pages = make_pages(1, 16, 0, N)
    row = request(pages, [0], [4, 5, 6, 1, 5, 7, 5, 7, 3, 4])
    assert longest(ops, pages, row)[:2] == (5, 6)


def test_a_chain_may_run_into_the_root(ops):
    pages = make_pages(1, 16, 0, N)
    assert longest(ops, pages, request(pages, [0], [3, X, 4, X])) == (4, X, 4)
    assert longest(ops, pages, request(pages, [0], [X, X, X])) == (X, X, X)
    # Nothing followed the root yet.
    assert longest(ops, pages, request(pages, [0], [5, X])) == ()


def test_a_chain_ends_where_the_history_is_unknown(ops):
    """A block whose tokens nobody recorded, e.g. one loaded from elsewhere."""
    pages = make_pages(3, 16, 0, N)
    write(ReferenceOps(), pages, [0], [*range(20, 35), X])
    write(ReferenceOps(), pages, [2], [1, 2, 3, 4])
    assert longest(ops, pages, Row([0, 1, 2], 36, X)) == ()
    pages.tokens[1, 0], pages.tokens[1, 2] = 8, 9
    assert longest(ops, pages, Row([0, 1, 2], 36, X)) == (8,)


def test_unknown_tokens_agree_with_nothing(ops):
    pages = make_pages(2, 16, 0, N)
    text = [1, EMPTY, X, 11, 2, 3, X, 21, 22, 23, 1, EMPTY, X]
    assert longest(ops, pages, request(pages, [1], text)) == (21, 22, 23)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_ngrams_across_block_borders(ops, block_size, n, cells):
    """The n-gram at every offset, through a block table in no order."""
    cells(2**20)
    table = [4, 1, 5, 0]
    for at in range(1, 2 * block_size + 2):
        pages = make_pages(6, block_size, 0, n)
        text = list(range(200, 200 + 3 * block_size + 5))
        text[at], text[at - 1], text[-1] = X, 7, X
        text[-2] = 7
        found = longest(ops, pages, request(pages, table, text))
        assert found == tuple(text[at + 1 : at + n])


def test_ngrams_of_the_window_are_followed_inside(ops):
    pages = make_pages(2, 16, 2, N)
    put_in_ring(pages, 0, [(9, X, 1, 2, 3), (9, X, 6)])
    pages.tokens[0, :2] = ints([8, 9])
    assert longest(ops, pages, Row([0], 2, X)) == (6,)
    put_in_ring(pages, 0, [(9, X, 6), (9, X, 1, 2, 3)])
    assert longest(ops, pages, Row([0], 2, X)) == (1, 2, 3)
    # The token before the key is no key.
    assert longest(ops, pages, Row([0], 1, 9)) == ()


@pytest.mark.parametrize("turned", [0, 1, 30])
def test_the_newest_of_a_ring_wins(ops, turned):
    """Wherever in the ring it lies."""
    pages = make_pages(2, 16, 2, N)
    size = pages.ring.shape[1]
    put_in_ring(pages, 1, [(1, X, 10 * k, 10 * k + 1, 10 * k + 2) for k in range(size)])
    pages.ring_count[1] = size + turned
    pages.tokens[1, :2] = ints([1, 1])
    newest = 10 * ((turned - 1) % size)
    assert longest(ops, pages, Row([1], 2, X)) == (newest, newest + 1, newest + 2)


def test_of_equals_a_later_block_and_then_the_history_wins(ops):
    pages = make_pages(3, 16, 2, N)
    text = [9, X, 5, *range(100, 115), 9, X]
    row = request(pages, [2, 1], text)
    assert longest(ops, pages, row)[0] == 5
    pages.tokens[2, :3] = ints([1, 2, 3])
    put_in_ring(pages, 1, [(9, X, 6)])
    put_in_ring(pages, 2, [(9, X, 7)])
    assert longest(ops, pages, row)[0] == 6


@pytest.mark.parametrize("seed", range(12))
def test_text_by_definition(ops, seed, cells):
    """Of random texts and n-grams: the most tokens that agree, the newest of these."""
    cells(2**20)
    rng = random.Random(seed)
    vocab, n = rng.choice([2, 3, 6]), 6
    size = rng.choice([4, 16])
    pages = make_pages(12, size, 2, n)
    length = rng.randint(1, 10 * size)
    blocks = rng.sample(range(12), 11)
    text = [rng.randrange(vocab) for _ in range(length + 1)]
    if seed % 2:
        text[:-1] = [t if rng.random() < 0.9 else EMPTY for t in text[:-1]]
    row = request(pages, blocks, text, g=1)
    texts = []
    for logical, block in enumerate(blocks):
        grams = [
            [rng.randrange(vocab) for _ in range(rng.randint(3, n + 1))]
            for _ in range(rng.randint(0, 5))
        ]
        put_in_ring(pages, block, grams)
        if logical < -(-length // size):
            # The token before the key is no key itself.
            texts += [(gram, 1) for gram in grams]
    texts.append((text, 0))
    chain, chances = [], []
    for _ in range(n - 1):
        context = [*text, *chain][-CONTEXT:]
        found = followed(texts, context)
        if not found:
            break
        (chance,) = chances_of([WEIGHTS[f"text{found[0]}"]], WEIGHTS["other"])
        chances.append(chance * (chances[-1] if chances else 1))
        chain.append(found[1])
    drafted = candidates(ops, pages, row)
    assert list(drafted) == [tuple(chain[:k]) for k in range(1, len(chain) + 1)]
    assert list(drafted.values()) == pytest.approx(chances)


@pytest.mark.parametrize("seed", range(12))
def test_answers_by_definition(ops, seed, cells):
    """As of the text: the most tokens that agree, and the newest of these."""
    cells(2**20)
    rng = random.Random(seed)
    vocab, size = rng.choice([2, 3, 6]), 4
    pages = make_pages(6, size, 0, 2)
    length = rng.randint(1, 5 * size)
    blocks = rng.sample(range(6), 5)
    # Of the text only the last tokens are known.
    before = [rng.randrange(vocab) for _ in range(min(2, length))]
    for at, token in zip(range(length)[-2:], before, strict=True):
        pages.tokens[blocks[at // size], at % size] = token
    row = Row(blocks, length, rng.randrange(vocab), n=2, g=9)
    answers = []
    for logical, block in enumerate(blocks):
        told = [
            (
                [rng.randrange(vocab) for _ in range(rng.randint(1, CONTEXT))],
                {rng.randrange(20, 40): rng.uniform(-9, 0) for _ in range(3)},
            )
            for _ in range(rng.randint(0, 6))
        ]
        put_answers(pages, block, told)
        answers += told if logical < -(-length // size) else []
    context = [*before, row.root]
    scores = {}
    if in_text := followed([(context, 0)], context):
        scores[in_text[1]] = WEIGHTS[f"text{in_text[0]}"]
    places = [([*known, i], len(known) - 1) for i, (known, _) in enumerate(answers)]
    if found := followed(places, context):
        for token, logprob in answers[found[1]][1].items():
            above = max(logprob - FLOOR, 0)
            scores[token] = WEIGHTS[f"answer{found[0]}"] * above
    chances = chances_of([*scores.values()], WEIGHTS["other"])
    expected = {(t,): x for t, x in zip(scores, chances, strict=True)}
    assert candidates(ops, pages, row) == pytest.approx(expected)


@pytest.mark.parametrize("block_size", [16, 128])
def test_what_is_out_of_reach_is_not_read(ops, block_size):
    """But for the history, of which all is read."""
    num_blocks = REACH // block_size + 4
    pages = make_pages(num_blocks + 1, block_size, 2, N)
    blocks = random.Random(0).sample(range(num_blocks + 1), num_blocks)
    end = num_blocks - 1  # of the blocks with tokens
    row = Row(blocks, end * block_size - 3, X)
    for logical, block in enumerate(blocks):
        pages.answer_count[:] = pages.ring_count[:] = 0
        put_answers(pages, block, [([X], {5: -1.0})])
        put_in_ring(pages, block, [(9, X, 6)])
        in_reach = end - REACH // block_size <= logical < end
        found = set(candidates(ops, pages, row))
        assert found == ({(5,), (6,)} if in_reach else set()), logical
    pages.tokens[blocks[0], :2] = ints([X, 7])
    assert list(candidates(ops, pages, row)) == [(7,)]


def test_num_cells():
    """A power of two, eight times the tokens or more, within bounds."""
    assert num_cells(1) == num_cells(MIN_CELLS // 8) == MIN_CELLS
    assert num_cells(MIN_CELLS // 8 + 1) == 2 * MIN_CELLS
    assert num_cells(MAX_CELLS // 8) == num_cells(10 * MAX_CELLS) == MAX_CELLS


def test_of_two_contexts_in_a_cell_the_older_is_lost(ops, cells):
    pages = make_pages(2, 16, 0, N)
    lost = request(pages, [0], [X, 1, 5, X])
    kept = request(pages, [1], [1, 5, X, X])
    put_answers(pages, 0, [([X], {7: -1.0}), ([5], {8: -1.0})])
    assert set(candidates(ops, pages, lost)) >= {(1,), (7,)}
    cells(1)
    assert not candidates(ops, pages, lost)
    assert longest(ops, pages, kept) == (X, X, X)


@pytest.mark.parametrize("count", [1, 2, 8, 32])
@pytest.mark.parametrize("seed", range(6))
def test_what_shares_a_cell_is_compared(ops, cells, count, seed):
    """However crowded a table: only what did follow is drafted, after that token."""
    cells(count)
    rng = random.Random(seed)
    pages = make_pages(8, 16, 2, N)
    text = [rng.randrange(12) for _ in range(90)]
    row = request(pages, [*range(8)], text, g=8)
    grams = [[rng.randrange(12) for _ in range(5)] for _ in range(8)]
    put_in_ring(pages, 3, grams)
    told = [([rng.randrange(12)], {rng.randrange(20, 40): -1.0}) for _ in range(30)]
    put_answers(pages, 2, told)
    follows = {pair for t in [text, *grams] for pair in zip(t, t[1:], strict=False)}
    follows |= {(tokens[-1], t) for tokens, said in told for t in said}
    for path in candidates(ops, pages, row):
        before = [row.root, *path][-2]
        assert (before, path[-1]) in follows
