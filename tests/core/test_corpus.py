# SPDX-License-Identifier: Apache-2.0
"""Whose blocks are read besides a request's own, and what is drafted from them."""

import random

import pytest
import torch

from tests.core.build import (
    Row,
    draft,
    ints,
    make_batch,
    make_pages,
    put_answers,
    put_in_ring,
    write,
)
from vllm_lookahead.core import corpus
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.corpus import NO_SALT, NOBODY, Owners, behind, salt_of
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.reference import ReferenceOps

SIZE, RED, BLUE = 4, salt_of("red"), salt_of("blue")
OLD, NEW = [1, 2, 3, 4, 5, 6, 7, 8], [11, 12]


def give_out(owners: Owners, pages: BlockPages, blocks: list[int], salt: int) -> None:
    salts = torch.full((len(blocks),), salt)
    owners.give_out(pages, torch.tensor(blocks), salts)


def read(
    owners: Owners, batch: RequestBatch, salts: list[int]
) -> tuple[RequestBatch, list[int]]:
    blocks, count = owners.others(batch, torch.tensor(salts), SIZE)
    return behind(batch, blocks, count, SIZE), count.tolist()


def served(ops, salt: int) -> tuple[BlockPages, Owners]:
    """Pages in which a request has said OLD under a salt, in blocks 4 and 2."""
    pages, owners = make_pages(8, SIZE, 0, 4), Owners.allocate(8)
    give_out(owners, pages, [4, 2], salt)
    write(ops, pages, [4, 2], OLD)
    give_out(owners, pages, [1], RED)
    write(ops, pages, [1], NEW)
    return pages, owners


def said(tree) -> list[int]:
    return tree.tokens[0, 1 : int(tree.num_nodes)].tolist()


def drafted(ops, pages: BlockPages, owners: Owners, root: int) -> list[int]:
    """What the request in block 1 drafts, which has said NEW, behind a root."""
    batch = make_batch([Row([1], 2, root, max_nodes=4)])
    batch, _ = read(owners, batch, [RED])
    return said(draft(ops, pages, batch, 4))


def test_others_are_read_under_the_same_salt(ops):
    assert drafted(ops, *served(ops, RED), root=4) == [5, 6, 7]


@pytest.mark.parametrize("salt", [BLUE, NO_SALT, NOBODY])
def test_other_salts_are_not(ops, salt):
    assert drafted(ops, *served(ops, salt), root=4) == []


def test_nobody_reads_nothing(ops):
    pages, owners = served(ops, NOBODY)
    _, count = read(owners, make_batch([Row([1], 2, 4)]), [NOBODY])
    assert count == [0]


def test_its_own_text_comes_first(ops):
    pages, owners = served(ops, RED)
    write(ops, pages, [1], [4, 9], 2)
    batch, _ = read(owners, make_batch([Row([1, 0], 4, 4, max_nodes=2)]), [RED])
    assert said(draft(ops, pages, batch, 4)) == [9]


def test_a_block_that_is_given_out_again_is_empty(ops):
    """Whoever gets it, before the first token is written."""
    pages, owners = served(ops, RED)
    put_answers(pages, 4, [([3, 4], {7: -0.1})])
    give_out(owners, pages, [4, 2], RED)
    assert drafted(ops, pages, owners, root=4) == []
    assert (pages.tokens[[4, 2]] == EMPTY).all()
    write(ops, pages, [4], [3, 4])  # not as far as the last owner got
    assert drafted(ops, pages, owners, root=4) == []


def test_rings_are_emptied_with_the_text():
    pages, owners = make_pages(3, SIZE, 2, 4), Owners.allocate(3)
    put_in_ring(pages, 1, [[1, 2, 3, 4, 5]])
    put_answers(pages, 1, [([3, 4], {7: -0.1})])
    give_out(owners, pages, [1], BLUE)
    assert pages.ngrams(1) == []
    assert int(pages.answer_count[1]) == 0


def test_copies_belong_to_the_same(ops):
    pages, owners = served(ops, BLUE)
    moved = torch.tensor([4]), torch.tensor([5])
    pages.copy_blocks(*moved)
    owners.copy_blocks(*moved)
    assert owners.salt[5] == BLUE
    assert owners.given[5] == owners.given[4]


def test_the_newest_of_all_are_read_as_plain_python_has_it(monkeypatch):
    monkeypatch.setattr(corpus, "CORPUS_TOKENS", 3 * SIZE)
    rng, seen = random.Random(0), set()
    pages, owners = make_pages(24, SIZE, 0, 4), Owners.allocate(24)
    log: list[tuple[int, int]] = []
    for _ in range(40):
        block, salt = rng.randrange(24), rng.choice([RED, BLUE, NO_SALT, NOBODY])
        give_out(owners, pages, [block], salt)
        log = [(b, s) for b, s in log if b != block] + [(block, salt)]
        rows = [
            Row(rng.sample(range(24), 5), rng.randint(0, 16), 1, max_nodes=3)
            for _ in range(3)
        ]
        salts = rng.choices([RED, BLUE, NO_SALT, NOBODY], k=3)
        batch = make_batch(rows)
        joined, counts = read(owners, batch, salts)
        for b, (row, salt) in enumerate(zip(rows, salts, strict=True)):
            own = row.blocks[: -(-(row.position + row.max_nodes) // SIZE)]
            others = [x for x, s in log if s == salt != NOBODY and x not in own][-3:]
            assert counts[b] == len(others)
            table = joined.block_table[b].tolist()
            assert table[: len(others) + 5] == others + row.blocks
            assert joined.position[b] == row.position + SIZE * len(others)
            seen.add(len(others))
        assert joined.root is batch.root
        assert joined.block_table.dtype == joined.position.dtype == torch.int32
    assert seen == {0, 1, 2, 3}


def test_pages_of_fewer_blocks_than_are_read():
    pages, owners = make_pages(2, SIZE, 0, 4), Owners.allocate(2)
    give_out(owners, pages, [1], RED)
    batch, count = read(owners, make_batch([Row([0], 1, 1, max_nodes=3)]), [RED])
    assert (count, batch.block_table.tolist()) == ([1], [[1, 0, 0]])


def test_noise_is_that_of_the_requests_own_place():
    """Of vLLM's V2 sampler it is keyed by the position."""
    pages, owners = served(ReferenceOps, RED)
    batch, count = read(owners, make_batch([Row([1], 2, 4, max_nodes=4)]), [RED])
    seen = set()

    def noise(seed: int, position: int, token: int) -> float:
        seen.add(position)
        return 0.0

    given = {"temperature": torch.ones(1), "before": ints(count) * SIZE}
    draft(ReferenceOps, pages, batch, 4, noise=noise, **given)
    assert seen == {2, 3, 4}


def test_salts():
    assert salt_of(None) == NO_SALT
    assert salt_of("") != NO_SALT
    assert 0 < salt_of("red") < 2**63
    assert salt_of("red") == RED != BLUE
