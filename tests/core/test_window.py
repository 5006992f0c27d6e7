# SPDX-License-Identifier: Apache-2.0
"""The Jacobi window over many steps, against the paper's algorithm in plain Python."""

import random
from collections import defaultdict

import pytest
import torch

from tests.core.build import (
    Row,
    clone_pages,
    draft,
    ints,
    make_batch,
    make_pages,
    write,
)
from tests.core.plain_python import PaperWindow
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, WINDOW

BLOCK = 16
VOCAB = 4  # few, so that candidates are accepted


class Simulation:
    """One request and what the paper says of it: window rows and n-grams harvested."""

    def __init__(self, row: Row, text: list[int], page_sizes: tuple[int, int]) -> None:
        self.row, self.text = row, text
        self.page_w, self.page_n = page_sizes
        self.window: PaperWindow | None = None
        self.log: dict[int, list[list[int]]] = defaultdict(list)  # by logical block

    def feed(self, fed: list[int]) -> None:
        """Check the window nodes of a step's tree; the first ones are the seeds."""
        w, n = self.row.w, self.row.n
        cells = [[EMPTY, *fed[: w - 1]]]
        cells += [fed[r * w - 1 : (r + 1) * w - 1] for r in range(1, n - 1)]
        if self.window is None:
            self.window = PaperWindow(cells)
        rows = self.window.rows
        assert [cells[0][1:], *cells[1:]] == [rows[0][1:], *rows[1:]]

    def advance(self, new: list[int], emitted: list[int]) -> None:
        assert self.window is not None
        grams = self.window.step(self.text[-2], self.text[-1], new)
        self.text += emitted
        tail = (len(self.text) - 2) // BLOCK
        self.log[tail] += grams
        self.row.position, self.row.root = len(self.text) - 1, self.text[-1]

    def assert_pages(self, pages: BlockPages) -> None:
        w, n = self.row.w, self.row.n
        tail = (self.row.position - 1) // BLOCK
        size = pages.ring.shape[1]
        for logical, block in enumerate(self.row.blocks):
            padding = [EMPTY] * (self.page_n - n)
            grams = [gram + padding for gram in self.log[logical]]
            assert pages.ngrams(block) == grams[-size:]
            assert pages.ring_count[block] == len(grams)
        page = pages.window[self.row.blocks[tail]]
        assert self.window is not None
        assert page[: n - 1, :w].tolist() == self.window.rows
        # Cells of other requests' sizes are unused.
        assert (page[n - 1 :] == EMPTY).all() and (page[:, w:] == EMPTY).all()


def start(
    ops: LookaheadOps, pages: BlockPages, blocks: list[int], length: int, w: int, n: int
) -> Simulation:
    rng = random.Random(length)
    text = [rng.randrange(VOCAB) for _ in range(length + 1)]
    write(ops, pages, blocks, text[:-1])
    row = Row(blocks, length, text[-1], w, n, 4)
    page_rows, page_w = pages.window.shape[1:]
    return Simulation(row, text, (page_w, page_rows + 1))


def step(
    ops: LookaheadOps,
    pages: BlockPages,
    simulations: list[Simulation],
    rng: random.Random,
) -> None:
    rows = [s.row for s in simulations]
    for row in rows:
        write(ops, pages, row.blocks, [row.root], row.position)
    batch = make_batch(rows)
    n = pages.window.shape[1] + 1
    tree = draft(ops, pages, batch, 4)
    sampled = ints([[rng.randrange(VOCAB) for _ in row] for row in tree.tokens])
    verdict = ops.verify(tree, sampled, n)
    ops.update(pages, batch, tree, sampled, verdict)
    for b, (simulation, nodes) in enumerate(
        zip(simulations, tree.nodes(), strict=True)
    ):
        window = [i for i, node in enumerate(nodes) if node.kind == WINDOW]
        simulation.feed([nodes[i].token for i in window])
        cells = [0, *window][-simulation.row.w :]  # the root is cell (0, 0)
        emitted = verdict.tokens[b, : verdict.num_emitted[b]].tolist()
        simulation.advance([int(sampled[b, i]) for i in cells], emitted)
        simulation.assert_pages(pages)


@pytest.mark.parametrize("length", [1, 13, 16, 17])
@pytest.mark.parametrize(
    "w, n", [(1, 2), (1, 5), (2, 2), (3, 3), (5, 4), (7, 5), (20, 3)]
)
def test_one_request_is_the_papers_algorithm(ops, w, n, length):
    pages = make_pages(7, BLOCK, w, n)
    simulation = start(ops, pages, [5, 2, 6, 0, 3, 1], length, w, n)
    rng = random.Random(w * n)
    tails, steps = set(), 0
    while simulation.row.position < 4 * BLOCK:
        step(ops, pages, [simulation], rng)
        tails.add((simulation.row.position - 1) // BLOCK)
        steps += 1
    assert len(tails) >= 3, "the window page moved with the tail, twice or more"
    assert steps < len(simulation.text) - length - 1, "some candidates were accepted"


def test_a_batch_of_requests_of_different_sizes(ops):
    w, n = 6, 5
    sizes = [(6, 5), (2, 5), (6, 2), (1, 2), (3, 4), (1, 5), (5, 3)]
    pages = make_pages(7 * len(sizes), BLOCK, w, n)
    blocks = random.Random(0).sample(range(len(pages.tokens)), len(pages.tokens))
    simulations = [
        start(ops, pages, [blocks.pop() for _ in range(7)], 5 * k + 1, w_r, n_r)
        for k, (w_r, n_r) in enumerate(sizes)
    ]
    rng = random.Random(1)
    for _ in range(30):
        step(ops, pages, simulations, rng)
    grams = {len(gram) for log in simulations[3].log.values() for gram in log}
    assert grams == {3}, "(token before, key, one value) for N = 2"


@pytest.mark.parametrize("position", [1, 2, 7, 15, 16, 17, 40])
@pytest.mark.parametrize("w, n", [(1, 4), (3, 4), (15, 5), (64, 6)])
def test_seeds_are_runs_of_the_history(ops, position, w, n):
    """Column j is a run of consecutive history tokens, going round at the end."""
    pages = make_pages(5, BLOCK, w, n)
    pages.tokens[:] = 9999  # of other owners; nothing beyond p-1 may be read
    text = list(range(100, 100 + position))
    write(ops, pages, [3, 1, 4], text)
    row = Row([3, 1, 4], position, 5, w, n, 0)
    (nodes,) = draft(ops, pages, make_batch([row]), 0).nodes()
    fed = [node.token for node in nodes]
    assert len(fed) == w * (n - 1)
    assert set(fed[1:]) <= set(text)
    for r in range(1, n - 1):
        for j in range(w):
            above = fed[(r - 1) * w + j]
            if (r - 1, j) != (0, 0):
                follows = text[(text.index(above) + 1) % position]
                assert fed[r * w + j] == follows
    if w > 3 and position == 40:
        assert len(set(fed[1:w])) > w // 3, "columns start apart"


def test_unknown_history_is_seeded_with_the_root(ops):
    pages = make_pages(1, BLOCK, 3, 3)
    row = Row([0], 10, 77, 3, 3, 0)
    (nodes,) = draft(ops, pages, make_batch([row]), 0).nodes()
    assert [node.token for node in nodes] == [77] * 6


def test_only_unused_cells_are_seeded(ops):
    pages = make_pages(2, BLOCK, 3, 4)
    write(ops, pages, [1], [50, 50, 50])
    pages.window[1] = ints([[EMPTY, 1, 2], [3, EMPTY, 4], [5, 6, EMPTY]])
    row = Row([1], 3, 77, 3, 4, 0)
    (nodes,) = draft(ops, pages, make_batch([row]), 0).nodes()
    assert [node.token for node in nodes] == [77, 1, 2, 3, 50, 4, 5, 6, 50]


@pytest.mark.parametrize("position, blocks", [(16, [1, 0]), (17, [0, 1])])
def test_the_window_is_that_of_the_block_of_the_last_final_token(ops, position, blocks):
    """At a border, p lies in a block already whose page is not the tail's yet."""
    pages = make_pages(2, BLOCK, 2, 3)
    pages.window[0], pages.window[1] = 10, 11
    row = Row(blocks, position, 5, 2, 3, 0)
    (nodes,) = draft(ops, pages, make_batch([row]), 0).nodes()
    assert [node.token for node in nodes] == [5, 11, 11, 11]


def test_no_harvest_without_a_whole_window(ops):
    """The candidates left no room for it, or the request runs without."""
    pages = make_pages(3, BLOCK, 3, 3)
    text = [7, 1, 2, 7, 3, 4, 7]
    for block in range(3):
        write(ops, pages, [block], text[:-1])
    pages.window[:] = 60
    rows = [
        Row([0], 6, 7, 3, 3, 2, max_nodes=6),
        Row([1], 6, 7, 0, 3, 2),
        Row([2], 6, 7, 3, 3, 2),
    ]
    batch = make_batch(rows)
    tree = draft(ops, pages, batch, 2)
    assert tree.num_nodes.tolist() == [3, 3, 8]
    sampled = torch.full(tree.tokens.shape, 8, dtype=torch.int32)
    before = clone_pages(pages)
    ops.update(pages, batch, tree, sampled, ops.verify(tree, sampled, 3))
    assert pages.ring_count.tolist() == [0, 0, 3]
    for block in (0, 1):
        assert torch.equal(pages.window[block], before.window[block])
        assert (pages.ring[block] == EMPTY).all()
    assert pages.window[2].tolist() == [[60] * 3, [8] * 3]


@pytest.mark.parametrize("max_nodes", [1, 5])
def test_a_window_that_was_not_fed_follows_the_tail(ops, max_nodes):
    """Also where an accepted token begins the next block, and so empties its page."""
    pages = make_pages(4, BLOCK, 3, 4)
    text = [*range(40, 48), 7, 1, 2, 3, 4, 5]
    rows = [Row([1, 0], 16, 7, 3, 4, 1, max_nodes)]
    rows.append(Row([3, 2], 16, 7, 0, 4, 1, max_nodes))
    for row in rows:
        write(ops, pages, row.blocks, [*text, 8, 9, 7])
    for block in (1, 3):
        pages.window[block] = 60 + block
    batch = make_batch(rows)
    tree = draft(ops, pages, batch, 1)
    assert tree.num_nodes.tolist() == [min(4, max_nodes)] * 2
    sampled = ints([[1, 2, 3, 4, *[8] * (tree.tokens.shape[1] - 4)]] * 2)
    before = clone_pages(pages)
    ops.update(pages, batch, tree, sampled, ops.verify(tree, sampled, 4))
    assert (pages.window[0] == 61).all()
    assert torch.equal(pages.window[1:], before.window[1:]), "of nobody else"
    assert (pages.ring == EMPTY).all()


def test_a_window_cut_by_the_scheduler_is_not_harvested(ops):
    """Nodes cut off after the tree was built look like padding."""
    pages = make_pages(1, BLOCK, 3, 3)
    write(ops, pages, [0], [1, 2, 3, 4])
    batch = make_batch([Row([0], 4, 5, 3, 3, 0)])
    tree = draft(ops, pages, batch, 0)
    tree.num_nodes -= 2
    tree.tokens[0, 4:], tree.parents[0, 4:], tree.kinds[0, 4:] = EMPTY, EMPTY, 0
    sampled = torch.full(tree.tokens.shape, 8, dtype=torch.int32)
    before = clone_pages(pages)
    ops.update(pages, batch, tree, sampled, ops.verify(tree, sampled, 3))
    for page, old in zip(vars(pages).values(), vars(before).values(), strict=True):
        assert torch.equal(page, old)


def test_the_output_becomes_history(ops):
    """Emitted tokens are in the pages, all but the last, whose K/V is to come."""
    pages = make_pages(3, BLOCK, 0, 5)
    text = [*range(100, 108), 7, 31, 32, 33, 34, 2, 3]
    row = Row([2, 0], len(text), 7, 0, 5, 1)
    write(ops, pages, row.blocks, [*text, 7])
    batch = make_batch([row])
    tree = draft(ops, pages, batch, 1)
    assert tree.kinds[0].tolist() == [0] + [CANDIDATE] * 4
    sampled = ints([[31, 32, 33, 34, 35]])
    ops.update(pages, batch, tree, sampled, ops.verify(tree, sampled, 5))
    known = pages.tokens[row.blocks].flatten().tolist()
    wanted = [*text, 7, 31, 32, 33, 34]
    assert known == wanted + [EMPTY] * (2 * BLOCK - len(wanted))
