# SPDX-License-Identifier: Apache-2.0
"""Whose texts, n-grams and answers are whose: pages are shared and reused as blocks."""

from dataclasses import replace

import pytest
import torch

from tests.core.build import (
    Row,
    candidates,
    clone_pages,
    draft,
    ints,
    make_batch,
    make_pages,
    put_answers,
    put_in_ring,
    write,
)
from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.pages import EMPTY, NUM_ANSWERS, BlockPages, page_bytes
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, WINDOW
from vllm_lookahead.params import LookaheadParams

W, N, G = 3, 4, 4
BLOCK = 16
X = 99
SECRET = range(7000, 8000)


def decode(ops: LookaheadOps, pages: BlockPages, row: Row, sampled: list[int]) -> Row:
    """One step in which nothing is drafted but the window; the request after it.

    Args:
        sampled: the model's token after the root, then after cells (N-2, j).
    """
    write(ops, pages, row.blocks, [row.root], row.position)
    batch = make_batch([replace(row, g=0)])
    tree = draft(ops, pages, batch, 0)
    answers = torch.full(tree.tokens.shape, 1, dtype=torch.int32)
    answers[0, 0] = sampled[0]
    first = int(tree.num_nodes[0]) - row.w
    answers[0, first : first + row.w] = ints(sampled[1:])
    verdict = ops.verify(tree, answers, row.n)
    ops.update(pages, batch, tree, answers, verdict)
    return Row(row.blocks, row.position + 1, sampled[0], row.w, row.n, row.g)


def keep(
    ops: LookaheadOps, pages: BlockPages, row: Row, said: dict[int, float]
) -> None:
    """Of a step that fed the root alone: what the model said after it."""
    batch = make_batch([replace(row, w=0, g=0)])
    tree = draft(ops, pages, batch, 0)
    tokens, logprobs = ints([[*said]]), torch.tensor([[*said.values()]])
    missing = 0, NUM_ANSWERS - len(said)
    answers = Answers(
        torch.nn.functional.pad(tokens, missing, value=EMPTY),
        torch.nn.functional.pad(logprobs, missing),
        ints([0]),
    )
    verdict = ops.verify(tree, tree.tokens, row.n)
    ops.keep_answers(pages, batch, tree, verdict, answers)


def drafted(ops: LookaheadOps, pages: BlockPages, row: Row) -> set[int]:
    """Tokens of all nodes below the root."""
    (nodes,) = draft(ops, pages, make_batch([row]), row.g).nodes()
    return {node.token for node in nodes[1:]}


def fill_with_secrets(pages: BlockPages, block: int, key: int = X) -> None:
    """What a request may leave: all of it on a common key, the window excepted."""
    pages.tokens[block] = torch.arange(SECRET.start, SECRET.start + BLOCK)
    pages.tokens[block, 2::4] = key
    put_in_ring(
        pages, block, [(key, key, *SECRET[k : k + N - 1]) for k in range(100, 104)]
    )
    pages.window[block] = torch.arange(7500, 7500 + (N - 1) * W).view(N - 1, W)
    likeliest = dict.fromkeys(SECRET[200:204], -1.0)
    answers = pages.answers.shape[1] * [([key], likeliest)]
    put_answers(pages, block, answers)


def test_the_first_slot_of_a_block_empties_its_rings_and_window(ops):
    pages = make_pages(3, BLOCK, W, N)
    for block in range(3):
        fill_with_secrets(pages, block)
    before = clone_pages(pages)

    ops.write_tokens(pages, torch.tensor([BLOCK, 2 * BLOCK + 1]), ints([11, 12]))

    assert (pages.ring[1] == EMPTY).all()
    assert pages.ring_count.tolist() == [4, 0, 4]
    full = pages.answers.shape[1]
    assert pages.answer_count.tolist() == [full, 0, full]
    assert (pages.window[1] == EMPTY).all()
    # The others are as they were, but for the token written.
    for page, old in zip(vars(pages).values(), vars(before).values(), strict=True):
        assert torch.equal(page[0], old[0])
    for name in ("ring", "window", "answers", "answer_logprobs"):
        assert torch.equal(getattr(pages, name)[2], getattr(before, name)[2])
    assert pages.tokens[1, 0] == 11 and pages.tokens[2, 1] == 12
    assert (pages.tokens != before.tokens).sum() == 2


def test_negative_slots_are_skipped(ops):
    pages = make_pages(2, BLOCK, W, N)
    fill_with_secrets(pages, 0)
    fill_with_secrets(pages, 1)
    before = clone_pages(pages)
    ops.write_tokens(pages, torch.tensor([-1, 3, -16, -1]), ints([1, 2, 3, 4]))
    before.tokens[0, 3] = 2
    for page, old in zip(vars(pages).values(), vars(before).values(), strict=True):
        assert torch.equal(page, old)


@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, 33])
def test_a_reused_block_leaks_nothing(ops, length):
    """Whatever the last owner left, the next one drafts from its own tokens only."""
    pages = make_pages(6, BLOCK, W, N)
    for block in range(6):
        fill_with_secrets(pages, block)
    blocks = [4, 1, 3, 0]
    prompt = [20 + k % 3 for k in range(length)]
    write(ops, pages, blocks, prompt)
    row = Row(blocks, length, X, W, N, G)
    for step in range(BLOCK + 2):
        found = drafted(ops, pages, row)
        assert not found & set(SECRET), f"step {step}"
        assert step < 2 or found >= {33, 34}, "its own answers are among them"
        following = decode(ops, pages, row, [X, 30, 31, 32])
        keep(ops, pages, row, {33: -1.0, 34: -2.0})
        row = following


def test_a_follow_up_finds_the_jacobi_ngrams_of_its_prefix(ops):
    pages = make_pages(8, BLOCK, W, N)
    prompt = list(range(100, 100 + BLOCK - 4))
    first = Row([5, 2, 7], len(prompt), X, W, N, G)
    write(ops, pages, first.blocks, prompt)
    while first.position < BLOCK + 3:
        first = decode(ops, pages, first, [first.position, X, 81, 82])
    text = pages.tokens[first.blocks].flatten()[: first.position].tolist()
    assert 81 not in text and 82 not in text

    # The tail was in block 5 up to the first position of block 2, then there.
    assert any(gram[-1] == 81 for gram in pages.ngrams(5))
    shared = [gram for gram in pages.ngrams(5) if EMPTY not in gram[1:]]
    gram = shared[-1]
    follow_up = Row([5, 6], BLOCK + 1, gram[1], 0, N, G)
    write(ops, pages, [6], [gram[0]])  # what its own prompt ends with
    assert tuple(gram[2:]) in candidates(ops, pages, follow_up)
    # In blocks of its own, as with another cache_salt: the same text, no n-gram.
    salted = Row([4, 3], BLOCK + 1, gram[1], 0, N, G)
    write(ops, pages, salted.blocks, [*text[:BLOCK], gram[0]])
    assert tuple(gram[2:]) not in candidates(ops, pages, salted)


def test_a_follow_up_finds_the_answers_of_its_prefix(ops):
    pages = make_pages(8, BLOCK, 0, N)
    text = [*range(100, 100 + BLOCK - 1), 41]
    first = Row([5, 2], BLOCK - 1, 41, 0, N, G)
    write(ops, pages, first.blocks, text)
    keep(ops, pages, first, {61: -1.0, 62: -2.0})
    follow_up = Row([5, 6], BLOCK + 1, 41, 0, N, G)
    write(ops, pages, [6], [8])
    assert list(candidates(ops, pages, follow_up))[:2] == [(61,), (62,)]
    # In blocks of its own: the same text, no answer.
    salted = Row([4, 3], BLOCK + 1, 41, 0, N, G)
    write(ops, pages, salted.blocks, [*text, 8])
    assert list(candidates(ops, pages, salted)) == [(8,), (8, 41), (8, 41, 8)]


def test_disjoint_blocks_never_share(ops):
    """Two requests of one batch with the same text; only one has met the secrets."""
    pages = make_pages(8, BLOCK, W, N)
    text = [40 + k % 5 for k in range(20)]
    tables = [5, 0], [1, 6]
    for table in tables:
        write(ops, pages, table, text)
    put_in_ring(pages, 5, [(44, X, SECRET[0])])
    put_in_ring(pages, 0, [(1, SECRET[0], *SECRET[10:12])])
    put_answers(pages, 0, [([X], {SECRET[20]: -1.0, SECRET[21]: -9.0})])
    pages.window[0] = SECRET[50]
    rows = [Row(table, 20, X, W, N, G) for table in tables]
    batch = make_batch(rows, filler=5)
    own, other = draft(ops, pages, batch, G).nodes()
    assert {n.token for n in own if n.kind == CANDIDATE} == {
        SECRET[0],
        *SECRET[10:12],
        *SECRET[20:22],
    }
    assert {n.token for n in own if n.kind == WINDOW} == {SECRET[50]}
    assert not {n.token for n in other} & set(SECRET)


def test_blocks_beyond_the_position_are_not_read(ops):
    """Reserved for the tree, or stale entries of the block table."""
    for position in (1, BLOCK - 1, BLOCK, BLOCK + 1):
        pages = make_pages(4, BLOCK, W, N)
        for block in range(4):
            fill_with_secrets(pages, block)
        write(ops, pages, [2, 0], [50] * position)
        row = Row([2, 0, 1, 3], position, X, W, N, G)
        assert not drafted(ops, pages, row) & set(SECRET)


@pytest.mark.parametrize(
    ("block_size", "w", "size"), [(16, 0, 0), (16, 1, 16), (16, 15, 64), (4, 20, 20)]
)
def test_ring_size(block_size, w, size):
    """As many as the slots may yield, at most four of them each, and one harvest."""
    assert make_pages(1, block_size, w, 3).ring.shape[1] == size


@pytest.mark.parametrize("w", [1, 3, 5, 20])
def test_the_oldest_of_a_ring_is_overwritten(ops, w):
    """Over several turns of a ring: exactly the newest remain, in order."""
    pages = make_pages(2, BLOCK, w, 2)
    size = pages.ring.shape[1]
    write(ops, pages, [1], [7, 8])
    row = Row([1, 0], 2, X, w, 2, 0)
    harvested: list[list[int]] = []
    for step in range(3 * size // w + 2):
        new = [1000 * (step + 1) + j for j in range(w)]
        batch = make_batch([row])
        tree = draft(ops, pages, batch, 0)
        keys = [X, *tree.tokens[0, 1:w].tolist()]
        answers = ints([new])
        verdict = ops.verify(tree, answers, 2)
        ops.update(pages, batch, tree, answers, verdict)
        # One step of the same request, over and over: its tail stays in block 1.
        befores = [8, *keys[:-1]]
        harvested += [list(g) for g in zip(befores, keys, new, strict=True)]
        assert pages.ring_count.tolist() == [0, len(harvested)]
        assert pages.ngrams(1) == harvested[-size:]


def test_pages_follow_copied_blocks(ops):
    pages = make_pages(5, BLOCK, W, N)
    for block in range(5):
        fill_with_secrets(pages, block, key=block)
    before = clone_pages(pages)
    # Its last token and its root are the key of block 0.
    copied = Row([2], BLOCK - 1, 0, 0, N, 8)
    assert not candidates(ops, pages, copied)
    pages.copy_blocks(torch.tensor([0, 3]), torch.tensor([2, 4]))
    for page, old in zip(vars(pages).values(), vars(before).values(), strict=True):
        assert torch.equal(page, old[[0, 1, 0, 3, 3]])
    found = {token for path in candidates(ops, pages, copied) for token in path}
    assert found == {*SECRET[103:106], *SECRET[200:204]}


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ((15, 5, 15), 0.015),
        ((0, 8, 8), 0.011),
        ((0, 2, 64), 0.011),
        ((64, 2, 64), 0.013),
        ((64, 8, 0), 0.02),
        ((34, 16, 0), 0.02),
    ],
    ids=str,
)
def test_pages_take_little_of_a_1b_models_kv_memory(sizes, most, block_size):
    """Of Llama 3.2 1B: 16 layers of 8 K/V heads of 64, in bf16."""
    kv_bytes = block_size * 16 * 2 * 8 * 64 * 2
    pages = page_bytes(block_size, LookaheadParams(*sizes))
    assert pages / (pages + kv_bytes) < most


@pytest.mark.parametrize("sizes", [(0, 2, 0), (1, 2, 1), (15, 5, 15), (64, 4, 8)])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_page_bytes_is_what_pages_take(sizes, block_size):
    params = LookaheadParams(*sizes)
    pages = BlockPages.allocate(3, block_size, params)
    tensors = vars(pages).values()
    total = sum(page.numel() * page.element_size() for page in tensors)
    assert total == 3 * page_bytes(block_size, params)
    assert pages.ring_count.tolist() == pages.answer_count.tolist() == [0] * 3
    unused = pages.tokens, pages.ring, pages.window, pages.answers
    assert all((cells == EMPTY).all() for cells in unused)
