# SPDX-License-Identifier: Apache-2.0
import random
from dataclasses import dataclass, field

import pytest
import torch

from tests.core.build import (
    Row,
    clone_pages,
    ints,
    make_batch,
    make_pages,
    put_in_ring,
)
from tests.core.equivalence import Shape, assert_same_pages, random_state
from tests.core.test_pool import request as request_of
from tests.kernels.build import POISON, REFERENCE, poison_table, poisoned
from vllm_lookahead.core.draft import pool as reference
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.triton_kernels import pool
from vllm_lookahead.triton_kernels.pool import LookupScratch, lookup
from vllm_lookahead.triton_kernels.write import write_tokens


def look_up(pages, batch, g, splits=None):
    b = len(batch.root)
    scratch = LookupScratch.allocate(max(b, splits or 1), g, pages.tokens.device)
    scratch.found.fill_(POISON)
    scratch.count.fill_(POISON)
    candidates = poisoned(b, g, pages.window.shape[1])
    lookup(pages, batch, scratch, candidates, splits)
    return candidates


def expected_chains(pages, batch, g):
    """The reference's, padded to [B, G, N-1]."""
    k = pages.window.shape[1]
    chains = torch.full((len(batch.root), g, k), EMPTY, dtype=torch.int32)
    for b, request in enumerate(batch.requests()):
        for i, chain in enumerate(reference.lookup(pages, request, g)):
            chains[b, i, : len(chain)] = ints(chain)
    return chains


def assert_same_lookup(pages, batch, g, splits=None):
    expected = expected_chains(pages, batch, g)
    batch = poison_table(batch, pages.block_size, ahead=-1)
    assert torch.equal(look_up(pages, batch, g, splits), expected)
    return expected


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_splits_of_a_ragged_batch(splits):
    """More splits than tiles, and blocks that do not divide among them."""
    shape = Shape(3, 4, 3, batch=3, num_blocks=61, vocab=4, holes=True)
    state = random_state(shape, seed=splits)
    assert_same_lookup(state.pages, state.batch, state.g, splits)


@pytest.mark.parametrize("block_size", [16, 1040])
def test_one_token_repeated(block_size):
    """Every slot is a match: far more than are listed, in one class and in all."""
    pages = make_pages(1200 // block_size + 2, block_size, 0, 4)
    pages.tokens.fill_(3)
    blocks = list(range(len(pages.tokens)))[::-1]
    rows = [Row(blocks, p, 3, g=2) for p in (1, 9, 10, 700, 1100)]
    assert_same_lookup(pages, make_batch(rows), 2)


def test_a_scan_goes_on_behind_its_first_tile():
    """The same match in every tile of a split, told apart by what follows."""
    pages = make_pages(100, 16, 0, 3)
    pages.tokens[:] = torch.arange(1600).view(100, 16) + 10
    pages.tokens[:, 5] = 1
    rows = [Row(list(range(100)), 1597, 1, n=3, g=30)]
    candidates = assert_same_lookup(pages, make_batch(rows), 30, splits=1)
    assert candidates[0, :, 0].tolist() == [16 * b + 16 for b in range(99, 69, -1)]


@dataclass
class Launches:
    """In place of a kernel: its grid and what was compiled in."""

    grid: tuple[int, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **sizes: self.sizes.update(sizes)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("requests", [1, 16])
@pytest.mark.parametrize("most", [33 * 1024, 128 * 1024])
def test_any_context_to_32k_is_scanned_in_one_round(
    monkeypatch, block_size, requests, most
):
    """At the default sizes; what a scan costs follows its rounds."""
    scan = Launches()
    monkeypatch.setattr(pool, "_scan_kernel", scan)
    monkeypatch.setattr(pool, "_select_kernel", Launches())
    pages = make_pages(1, block_size, 15, 5)
    row = Row([0] * (most // block_size), 1, 1, w=15, n=5, g=15)
    look_up(pages, make_batch([row] * requests), 15)
    for context in (1024, 8192, 16384, 32768):
        per_split = -(-context // block_size // scan.grid[1])
        entries = per_split * scan.sizes["ENTRIES"]
        assert entries >= per_split * (block_size + pages.ring.shape[1])
        assert -(-entries // scan.sizes["BLOCK"]) == 1


@pytest.mark.parametrize("position", [1000, 32768])
def test_a_long_context(position):
    """As wide tiles as there are, on a request that fills them and one that doesn't."""
    pages = make_pages(2056, 16, 15, 5)
    draw = torch.Generator(pages.tokens.device).manual_seed(position)
    for page in (pages.tokens, pages.ring):
        page.random_(0, 300, generator=draw)
    pages.ring_count.random_(pages.ring.shape[1], 200, generator=draw)
    order = torch.randperm(2056, generator=draw, device=pages.tokens.device)
    row = Row(order.tolist(), position, 7, n=5, g=15)
    assert_same_lookup(pages, make_batch([row]), 15)


def matches_of(values: list[int]):
    """The root once per block, after a token of its own, then one of `values`."""
    blocks = len(values)
    pages = make_pages(blocks + 1, 16, 0, 2)
    pages.tokens[:] = torch.arange(16 * blocks + 16).view(-1, 16) + 1000
    pages.tokens[:blocks, 5] = 1
    pages.tokens[:blocks, 6] = ints(values)
    row = Row(list(range(blocks + 1)), 16 * blocks + 3, 1, n=2, g=2)
    return pages, make_batch([row])


@pytest.mark.parametrize(("values", "found"), [([7], 7), ([7, 8], EMPTY)])
def test_how_many_entries_are_ranked(values, found):
    """4G of them; the others may be anything."""
    pages, batch = matches_of([*values, 9, *[8] * 6])
    candidates = assert_same_lookup(pages, batch, 2)
    assert candidates.tolist() == [[[8], [9]]]
    pages, batch = matches_of([*values, *[8] * 7])
    candidates = assert_same_lookup(pages, batch, 2)
    assert candidates.tolist() == [[[8], [found]]]


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_no_entry_is_in_two_splits(splits):
    """Though a split's last tile reaches into the next: 4G entries are 4G places."""
    pages, batch = matches_of([EMPTY] * 100)
    pages.tokens[:, 5] = 0
    pages.tokens[[0, 40, 42, 45, 48, 60, 70, 80], 5] = 1
    pages.tokens[:, 6] = 8
    pages.tokens[0, 6] = 7
    candidates = assert_same_lookup(pages, batch, 2, splits)
    assert candidates.tolist() == [[[8], [7]]]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 1, batch=1, vocab=2),
        Shape(0, 16, 2, batch=2, vocab=2),
        Shape(5, 5, 5, batch=5, vocab=3, at_border=True),
        Shape(20, 3, 4, batch=2, vocab=3, block_size=4, num_blocks=9),
        Shape(2, 4, 20, batch=1, vocab=40, num_blocks=12, same_sizes=True),
        Shape(4, 4, 4, empty_pool=True, vocab=50),
    ],
)
def test_same_as_the_reference(shape):
    for seed in range(3):
        state = random_state(shape, seed)
        assert_same_lookup(state.pages, state.batch, state.g)


def test_no_candidates_wanted():
    state = random_state(Shape(2, 3, 0), seed=0)
    assert look_up(state.pages, state.batch, state.g).shape == (3, 0, 2)


def test_padding_reads_nothing():
    """Garbage for a block table: as a CUDA graph's padding has it."""
    pages = make_pages(2, 16, 2, 3)
    batch = make_batch([Row([POISON], POISON, POISON, g=0)])
    assert (look_up(pages, batch, 2) == EMPTY).all()


@pytest.mark.parametrize("n", [0, 1, 33, 100])
@pytest.mark.parametrize("w", [0, 3, 20])
def test_write_tokens(n, w):
    pages = random_state(Shape(w, 3, 1, block_size=8), seed=w).pages
    before = clone_pages(pages)
    slots = torch.randperm(len(pages.tokens) * 8)[:n]
    slots[1::3] = -1
    tokens = torch.randint(0, 1000, (n,), dtype=torch.int32)
    expected = clone_pages(pages)
    REFERENCE.write_tokens(expected, slots, tokens)
    write_tokens(pages, slots, tokens)
    assert_same_pages(pages, expected)
    if n:
        with pytest.raises(AssertionError):
            assert_same_pages(pages, before)


def test_scratch_too_small():
    state = random_state(Shape(2, 3, 2), seed=0)
    scratch = LookupScratch.allocate(1, 2, "cpu")
    with pytest.raises(ValueError, match="too small for 3 requests"):
        lookup(
            state.pages,
            state.batch,
            scratch,
            ints([[[0] * 2] * 2] * 3),
            splits=64,
        )


@pytest.mark.parametrize("seed", range(60))
def test_random_pools(seed):
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
            request_of(pages, table, text, n=rng.randint(2, n), g=rng.randint(0, g))
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

    assert_same_lookup(pages, make_batch(rows, filler=blocks[0]), g)
