# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest
import torch

from tests.core.build import Row, clone_pages, ints, make_batch, make_pages, make_tree
from tests.core.equivalence import (
    SHAPES,
    Shape,
    assert_same_likeliest_tokens,
    assert_same_pages,
    random_answers,
    random_samples,
    random_state,
)
from tests.kernels.build import (
    POISON,
    REFERENCE,
    AnySizeTritonOps,
    poison_padding,
    poison_table,
    poisoned,
    random_draft,
)
from tests.kernels.test_verify import empty_verdict
from vllm_lookahead.core import answers as core_answers
from vllm_lookahead.core.answers import LANES, MAX_REJECTED, Answers
from vllm_lookahead.core.pages import EMPTY, NUM_ANSWERS
from vllm_lookahead.core.tree import CANDIDATE, ROOT, Node
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.answers import keep_answers

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 3, 8, 1024, 1025, 2048, 5000, 50257])
def test_likeliest_tokens(vocab, dtype):
    likeliest = AnySizeTritonOps().likeliest_tokens
    assert_same_likeliest_tokens(likeliest, vocab, dtype)


def test_rows_apart():
    """Nothing between rows is read; and no row at all is none."""
    wide = torch.full((3, 2000), torch.inf)
    wide[:, :1100] = torch.randn(3, 1100)
    tokens, logprobs = AnySizeTritonOps().likeliest_tokens(wide[:, :1100])
    expected = core_answers.likeliest_tokens(wide[:, :1100])
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)
    tokens, logprobs = AnySizeTritonOps().likeliest_tokens(wide[:0])
    assert tokens.shape == logprobs.shape == (0, NUM_ANSWERS)


def test_ties_go_to_the_first_lane_and_to_its_first_token():
    logits = torch.zeros(2, 3 * LANES + 7)
    logits[1, LANES + 5] = logits[1, 2 * LANES + 3] = logits[1, 3] = 2
    tokens, logprobs = AnySizeTritonOps().likeliest_tokens(logits)
    assert tokens[0].tolist() == list(range(NUM_ANSWERS))
    ranked = [3, LANES + 5, 0, 1, 2, 4, *range(6, 100)]
    assert tokens[1].tolist() == ranked[:NUM_ANSWERS]
    equal = torch.full((NUM_ANSWERS,), 1 / LANES)
    torch.testing.assert_close(logprobs[0].exp(), equal)


def random_step(shape: Shape, seed: int):
    """A state after `update`, as it was told; with garbage where nothing is read."""
    state = random_state(shape, seed)
    tree = random_draft(state, shape, seed)
    sampled = random_samples(tree, shape.vocab, seed)
    verdict = REFERENCE.verify(tree, sampled, shape.n)
    REFERENCE.update(state.pages, state.batch, tree, sampled, verdict)
    answers = random_answers(tree, shape.vocab, seed)
    batch = poison_table(state.batch, shape.block_size, ahead=shape.n - 1)
    return state, batch, tree, verdict, answers


def assert_same_answers(pages, batch, tree, verdict, answers, poisoned_batch=None):
    expected = clone_pages(pages)
    REFERENCE.keep_answers(expected, batch, tree, verdict, answers)
    verdict.path.masked_fill_(verdict.path == EMPTY, POISON)
    tree = poison_padding(tree)
    keep_answers(pages, poisoned_batch or batch, tree, verdict, answers)
    assert_same_pages(pages, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_same_as_the_reference(name):
    """Rings that turn, paths of any length; texts shorter than a context."""
    for seed in range(3):
        state, batch, *step = random_step(SHAPES[name], seed)
        assert_same_answers(state.pages, state.batch, *step, poisoned_batch=batch)


def test_a_ring_that_turns_within_a_step():
    """Blocks of one slot keep fewer answers than a step gives."""
    shape = Shape(0, 16, 8, block_size=1, num_blocks=30, same_sizes=True)
    most = 0
    for seed in range(3):
        state, _, *step = random_step(shape, seed)
        before = state.pages.answer_count.clone()
        assert_same_answers(state.pages, state.batch, *step)
        most = max(most, int((state.pages.answer_count - before).max()))
    assert most > state.pages.answers.shape[1]


def test_a_chain_accepted_to_its_end_and_one_rejected():
    """Candidates in any order: those not on the path, the first of them the newest."""
    pages = make_pages(3, 16, 0, 5)
    pages.tokens[2, :2] = ints([40, 41])
    nodes = [Node(7, -1, 0, ROOT), Node(8, 0, 1, CANDIDATE), Node(9, 0, 1, CANDIDATE)]
    nodes += [Node(5, 2, 2, CANDIDATE), Node(6, 1, 2, CANDIDATE)]
    path = ints([[0, 2, 3, -1, -1]])
    said = torch.arange(5 * NUM_ANSWERS, dtype=torch.int32).view(5, NUM_ANSWERS)
    answers = Answers(said, -said.float(), ints([0]))
    batch = make_batch([Row([2, 1], 2, 7, n=5)])
    verdict = Verdict(path, path, ints([3]))
    assert_same_answers(pages, batch, make_tree([nodes]), verdict, answers)
    assert pages.answer_count.tolist() == [0, 0, 5]
    contexts = [[6, 8, 7], [8, 7, 41], [7, 41, 40], [9, 7, 41], [5, 9, 7]]
    assert pages.answers[2, :5, :3].tolist() == contexts
    assert pages.answers[2, :5, 3].tolist() == [
        NUM_ANSWERS * i for i in (4, 1, 0, 2, 3)
    ]


def test_no_more_rejected_than_are_wanted():
    """And the first token of all, before which there is no text."""
    pages = make_pages(2, 64, 0, 4)
    drafted = range(MAX_REJECTED + 12)
    nodes = [Node(7, -1, 0, ROOT), *[Node(i, 0, 1, CANDIDATE) for i in drafted]]
    shape = len(nodes), NUM_ANSWERS
    answers = Answers(poisoned(*shape), torch.randn(shape), ints([0]))
    path = ints([[0, -1, -1, -1]])
    batch = make_batch([Row([1], 0, 7)])
    verdict = Verdict(path, path, ints([1]))
    assert_same_answers(pages, batch, make_tree([nodes]), verdict, answers)
    assert pages.answer_count[1] == MAX_REJECTED + 1
    assert pages.answers[1, MAX_REJECTED, :3].tolist() == [7, EMPTY, EMPTY]


def test_padding_writes_nothing():
    pages = make_pages(2, 16, 3, 4)
    before = clone_pages(pages)
    tree = make_tree([[]] * 2 + [[(1, -1, 0, 0)] * 9])
    tree = replace(tree, num_nodes=torch.zeros(3, dtype=torch.int32))
    batch = make_batch([Row([POISON], POISON, POISON, w=POISON)] * 3)
    shape = 1, NUM_ANSWERS
    answers = Answers(poisoned(*shape), torch.zeros(shape), poisoned(3))
    keep_answers(pages, batch, tree, empty_verdict(3, 4), answers)
    assert_same_pages(pages, before)
