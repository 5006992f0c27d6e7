# SPDX-License-Identifier: Apache-2.0
"""What is in the tables, cell by cell; `test_draft` has what is found in them."""

import random

import pytest
import torch

from tests.core.build import Row, ints, make_batch, make_pages, put_answers, put_in_ring
from tests.core.equivalence import Shape, random_state
from tests.kernels.build import POISON, poison_table
from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.draft import index as reference
from vllm_lookahead.core.pages import CONTEXT, EMPTY, BlockPages, until_empty
from vllm_lookahead.triton_kernels import index
from vllm_lookahead.triton_kernels.index import HISTORY, IndexTables, file_contexts

Filed = dict[int, tuple[list[int], list[int]]]  # context and successors by cell


def tables_of(pages: BlockPages, batch: RequestBatch, rows: int = 0) -> IndexTables:
    b, blocks = batch.block_table.shape
    tables = IndexTables.allocate(
        rows or b, blocks * pages.block_size, pages.tokens.device
    )
    for table in (tables.text, tables.answers):
        table.fill_(POISON)
    return tables


def numbers(table: torch.Tensor, epoch: int) -> dict[int, int]:
    """What a launch has filed in a row of cells."""
    return {
        at: held & 0xFFFFFFFF
        for at, held in enumerate(table.tolist())
        if held >> 32 == epoch
    }


def text_filed(pages: BlockPages, request: Request, found: dict[int, int]) -> Filed:
    """The places that the numbers tell."""
    size, width = pages.ring.shape[1:]
    history, filed = [*pages.history(request), request.root], {}
    for cell, number in found.items():
        if number >= HISTORY.value:
            tokens, at = history, number - HISTORY.value
        else:
            entry, at = divmod(number, width)
            block = request.blocks[entry // (2 * size)]
            tokens = pages.ring[block, entry % size].tolist()
        filed[cell] = reference.context_at(tokens, at), [tokens[at + 1]]
    return filed


def answers_filed(pages: BlockPages, request: Request, found: dict[int, int]) -> Filed:
    kept = pages.answers.shape[1]
    filed = {}
    for cell, number in found.items():
        block = request.blocks[number // (2 * kept)]
        entry = pages.answers[block, number % kept].tolist()
        filed[cell] = until_empty(entry[:CONTEXT]), entry[CONTEXT:]
    return filed


def assert_same_tables(
    pages: BlockPages,
    batch: RequestBatch,
    tables: IndexTables | None = None,
    splits: int | None = None,
) -> list[reference.Index]:
    tables = tables or tables_of(pages, batch)
    nearly_all = poison_table(batch, pages.block_size, ahead=-1)
    file_contexts(pages, nearly_all, tables, splits)
    indices = []
    for b, request in enumerate(batch.requests()):
        of_text = numbers(tables.text[b], int(tables.epoch))
        of_answers = numbers(tables.answers[b], int(tables.epoch))
        if request.verification_set_size == 0 or request.max_nodes < 2:
            assert not of_text and not of_answers
            continue
        text = reference.text_index(pages, request)
        expected = {at: (c, list(s)) for at, (c, s) in text.cells.items()}
        assert text_filed(pages, request, of_text) == expected
        answers = reference.answer_index(pages, request)
        assert answers_filed(pages, request, of_answers).keys() == answers.cells.keys()
        for at, (context, said) in answers_filed(pages, request, of_answers).items():
            assert context == answers.cells[at][0]
            assert set(said) == set(answers.cells[at][1])
        indices += [text, answers]
    return indices


@pytest.mark.parametrize("splits", [None, 1, 2, 7, 32])
def test_splits_of_a_ragged_batch(splits):
    """More splits than tiles, and places that do not divide among them."""
    shape = Shape(3, 4, 3, batch=3, num_blocks=61, vocab=4, holes=True)
    for seed in range(2):
        state = random_state(shape, seed)
        indices = assert_same_tables(state.pages, state.batch, None, splits)
        assert any(index.cells for index in indices)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 1, batch=1, vocab=2),
        Shape(0, 16, 2, batch=2, vocab=2),
        Shape(5, 5, 5, batch=5, vocab=3, at_border=True),
        Shape(20, 3, 4, batch=2, vocab=3, block_size=4, num_blocks=9),
        Shape(2, 4, 20, batch=1, vocab=40, num_blocks=12, same_sizes=True),
        Shape(4, 4, 4, empty_rings=True, vocab=50),
        Shape(2, 3, 2, block_size=128, num_blocks=9, vocab=30),
    ],
)
def test_same_as_the_reference(shape):
    for seed in range(3):
        state = random_state(shape, seed)
        assert_same_tables(state.pages, state.batch)


@pytest.mark.parametrize("block_size", [16, 1040])
def test_one_token_repeated(block_size):
    """Everything is filed in the same few cells: the newest place has them."""
    pages = make_pages(1200 // block_size + 2, block_size, 0, 4)
    pages.tokens.fill_(3)
    blocks = list(range(len(pages.tokens)))[::-1]
    rows = [Row(blocks, p, 3, g=2) for p in (1, 9, 10, 700, 1100)]
    assert_same_tables(pages, make_batch(rows))


@pytest.mark.parametrize("position", [0, 1000, 32768])
def test_a_long_context(position):
    """More tokens than cells; rings within reach of the root, and far from it."""
    pages = make_pages(2056, 16, 15, 5)
    draw = torch.Generator(pages.tokens.device).manual_seed(position)
    for page in (pages.tokens, pages.ring, pages.answers):
        page.random_(0, 300, generator=draw)
    pages.ring_count.random_(pages.ring.shape[1], 200, generator=draw)
    pages.answer_count.random_(0, 200, generator=draw)
    order = torch.randperm(2056, generator=draw, device=pages.tokens.device)
    row = Row(order.tolist(), position, 7, n=5, g=15)
    assert_same_tables(pages, make_batch([row]))


def test_a_table_is_not_emptied_between_launches():
    """What an earlier launch filed is there, and is not found."""
    shape = Shape(3, 4, 3, batch=3, vocab=4, same_sizes=True)
    states = [random_state(shape, seed) for seed in range(4)]
    tables = tables_of(states[0].pages, states[0].batch, rows=5)
    for state in states:
        state.batch.position.clamp_(max=20)
        assert_same_tables(state.pages, state.batch, tables)
    assert tables.epoch == 4
    assert (tables.text[3:] == POISON).all()


def test_launches_that_were_counted_to_the_end():
    state = random_state(Shape(3, 4, 3, same_sizes=True), 0)
    tables = tables_of(state.pages, state.batch)
    tables.num_launches = index._MOST_LAUNCHES - 1
    tables.epoch.fill_(tables.num_launches)
    for expected in (index._MOST_LAUNCHES, 1, 2):
        assert_same_tables(state.pages, state.batch, tables)
        assert tables.epoch == expected


def test_padding_reads_nothing():
    """Garbage for a block table: as a CUDA graph's padding has it."""
    pages = make_pages(2, 16, 2, 3)
    rows = [
        Row([POISON], POISON, POISON, g=0),
        Row([POISON], POISON, POISON, max_nodes=1),
        Row([POISON], POISON, POISON, max_nodes=0),
    ]
    batch = make_batch(rows)
    tables = tables_of(pages, batch)
    file_contexts(pages, batch, tables)
    assert (tables.text == POISON).all() and (tables.answers == POISON).all()


def test_answers_are_not_read_beyond_their_count():
    """Nor rings; and a place without a successor is filed nowhere."""
    pages = make_pages(2, 16, 1, 4)
    pages.ring.fill_(9)
    pages.answers.fill_(9)
    put_in_ring(pages, 1, [[1, 2, 3]])
    put_answers(pages, 1, [([5, 4], {6: -1.0}), ([], {7: -1.0})])
    pages.tokens[1, :3] = ints([7, EMPTY, 8])
    batch = make_batch([Row([1, 0], 3, 2)])
    text, answers = assert_same_tables(pages, batch)
    assert sorted(c for c, _ in text.cells.values()) == [[2, 1], [2, 1], [8]]
    assert sorted(c for c, _ in answers.cells.values()) == [[4, 5], [4, 5]]


def test_tables_too_small():
    pages = make_pages(1, 16, 2, 3)
    batch = make_batch([Row([0] * 64, 1, 0)])
    tables = IndexTables.allocate(1, 512, pages.tokens.device)
    with pytest.raises(ValueError, match="cells are too small for 64 blocks of 16"):
        file_contexts(pages, batch, tables)
    pages = make_pages(1, 2**16, 2, 3)
    batch = make_batch([Row([0] * 2**14, 1, 0)])
    with pytest.raises(ValueError, match="cannot be numbered"):
        file_contexts(pages, batch, IndexTables.allocate(1, 2**30, pages.tokens.device))


@pytest.mark.parametrize("seed", range(40))
def test_random_pages(seed):
    """Histories and rings of few tokens, so that nearly all cells are fought for."""
    rng = random.Random(seed)
    w, n = rng.randint(0, 3), rng.randint(2, 6)
    size, vocab = rng.choice([4, 16]), rng.randint(1, 4)
    pages = make_pages(13, size, w, n)
    blocks = rng.sample(range(13), 13)
    rows = []
    for _ in range(3):
        table = [blocks.pop() for _ in range(4)]
        length = rng.choice([1, size, size + 1, 2 * size, rng.randint(1, 4 * size - 1)])
        for at in range(length):
            pages.tokens[table[at // size], at % size] = rng.randrange(vocab)
        rows.append(Row(table, length, rng.randrange(vocab), n=n, g=rng.randint(0, 3)))
        for block in table:
            kept = pages.ring.shape[1]
            grams = [
                [rng.randrange(vocab) for _ in range(rng.randint(2, n + 1))]
                for _ in range(rng.randint(0, kept))
            ]
            put_in_ring(pages, block, grams)
            # The ring has turned: the same n-grams, begun at another cell.
            turn = rng.randint(0, 9) if len(grams) == kept and kept else 0
            pages.ring[block] = pages.ring[block].roll(turn, 0)
            pages.ring_count[block] += turn
            texts = [
                [rng.randrange(vocab) for _ in range(min(3, rng.randint(0, 4)))]
                for _ in range(rng.randint(0, pages.answers.shape[1]))
            ]
            answers = [(text, {i: -1.0}) for i, text in enumerate(texts)]
            put_answers(pages, block, answers)
            if len(answers) == pages.answers.shape[1]:
                turn = rng.randint(0, 99)
                pages.answers[block] = pages.answers[block].roll(turn, 0)
                pages.answer_count[block] += turn
    if rng.random() < 0.3:
        pages.tokens[:, rng.randrange(size)] = EMPTY  # never recorded
    assert_same_tables(pages, make_batch(rows, filler=blocks[0]))
