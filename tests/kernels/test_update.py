# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from tests.core.build import Row, clone_pages, make_batch, make_pages, make_tree
from tests.core.equivalence import (
    Shape,
    assert_same_pages,
    random_samples,
    random_state,
)
from tests.kernels.build import (
    POISON,
    REFERENCE,
    poison_padding,
    poison_table,
    poisoned,
    random_draft,
)
from tests.kernels.test_verify import empty_verdict
from vllm_lookahead.core.tree import WINDOW
from vllm_lookahead.triton_kernels.update import update


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 4, 3),
        Shape(1, 2, 0, same_sizes=True),
        Shape(1, 2, 2, batch=5, at_border=True, vocab=2),
        Shape(6, 2, 4, vocab=2),
        Shape(1, 5, 3, vocab=2),
        Shape(5, 4, 5, batch=5, vocab=2, same_sizes=True),
        Shape(20, 3, 4, block_size=8, vocab=2),
        Shape(2, 16, 3, block_size=4, num_blocks=9, vocab=1, same_sizes=True),
        Shape(15, 5, 15, vocab=2, batch=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_same_as_the_reference(shape, dtype):
    """Emitted tokens cross blocks; rings turn over; windows are cut or absent."""
    for seed in range(3):
        state = random_state(shape, seed)
        tree = random_draft(state, shape, seed)
        sampled = random_samples(tree, shape.vocab, seed).to(dtype)
        verdict = REFERENCE.verify(tree, sampled, shape.n)
        expected = clone_pages(state.pages)
        REFERENCE.update(expected, state.batch, tree, sampled, verdict)

        batch = poison_table(state.batch, shape.block_size, ahead=shape.n - 1)
        verdict.tokens.masked_fill_(verdict.tokens == -1, POISON)
        update(state.pages, batch, poison_padding(tree), sampled, verdict)
        assert_same_pages(state.pages, expected)


def test_a_window_that_was_cut_is_kept():
    shape = Shape(4, 4, 2, batch=2, same_sizes=True)
    state = random_state(shape, seed=0)
    tree = random_draft(state, shape, 0)
    cut = replace(tree, num_nodes=tree.num_nodes - 1)
    last = torch.arange(tree.tokens.shape[1]) == cut.num_nodes[:, None]
    cut.kinds[last & (cut.kinds == WINDOW)] = 0
    sampled = random_samples(cut, 5, 0)
    verdict = REFERENCE.verify(cut, sampled, 4)
    expected = clone_pages(state.pages)
    REFERENCE.update(expected, state.batch, cut, sampled, verdict)
    update(state.pages, state.batch, cut, sampled, verdict)
    assert_same_pages(state.pages, expected)


def test_padding_writes_nothing():
    pages = make_pages(2, 16, 3, 4)
    before = clone_pages(pages)
    tree = make_tree([[]] * 2 + [[(1, -1, 0, 0)] * 9])
    tree = replace(tree, num_nodes=torch.zeros(3, dtype=torch.int32))
    batch = make_batch([Row([POISON], POISON, POISON, w=POISON)] * 3)
    update(pages, batch, tree, poisoned(3, 9), empty_verdict(3, 4))
    assert_same_pages(pages, before)
