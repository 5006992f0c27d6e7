# SPDX-License-Identifier: Apache-2.0
"""What the model said after each node: kept with the text, and drafted from."""

import random
from collections.abc import Sequence

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
    make_tree,
    write,
)
from tests.core.equivalence import distinct_tokens, falling_logprobs, random_answers
from tests.core.plain_python import walk
from tests.core.test_verify import chain
from vllm_lookahead.core import answers as reference
from vllm_lookahead.core.answers import LANES, MAX_REJECTED, Answers
from vllm_lookahead.core.pages import (
    ANSWERS_PER_SLOT,
    CONTEXT,
    EMPTY,
    NUM_ANSWERS,
    BlockPages,
)
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree, Node
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels import answers as numba_answers

BLOCK = 16
N = 4

Entry = tuple[list[int], int]  # a context, nearest token first, and its row of answers


def kept(pages: BlockPages, block: int) -> list[list[int]]:
    """A ring of answers, oldest first: context and tokens."""
    count, size = int(pages.answer_count[block]), pages.answers.shape[1]
    order = range(max(0, count - size), count)
    return [pages.answers[block, at % size].tolist() for at in order]


def entries(nodes: Sequence[Node], path: Sequence[int], text: list[int]) -> list[Entry]:
    """What a step leaves, oldest first, of rows that begin with the root's."""
    off = [i for i in range(len(nodes)) if nodes[i].kind == CANDIDATE and i not in path]
    found = []
    for i in [*off[:MAX_REJECTED][::-1], *path]:
        branch, at = [], i
        while at != EMPTY:
            branch.append(nodes[at].token)
            at = nodes[at].parent
        context = [*branch, *text[::-1], *[EMPTY] * CONTEXT][:CONTEXT]
        found.append((context, i))
    return found


def random_ranked_tree(rng: random.Random, size: int, num_window: int) -> list[Node]:
    """Candidates with distinct siblings, and some nodes of a window behind them."""
    nodes = [Node(rng.randrange(9), EMPTY, 0, ROOT)]
    while len(nodes) < size:
        parent = max(0, len(nodes) - rng.choice([1, 1, 2, size]))
        taken = {node.token for node in nodes if node.parent == parent}
        token = rng.choice([t for t in range(99) if t not in taken])
        nodes.append(Node(token, parent, nodes[parent].depth + 1, CANDIDATE))
    for _ in range(num_window):
        nodes.append(Node(rng.randrange(9), 0, 1, WINDOW))
    return nodes


def verdict_of(trees: Sequence[Sequence[Node]], tree: DraftTree, rng) -> Verdict:
    """That of samples which follow some branch of each tree."""
    sampled = []
    for nodes in trees:
        row = [rng.randrange(9) for _ in range(tree.tokens.shape[1])]
        for node in nodes[1:]:
            if node.kind == CANDIDATE and rng.random() < 0.6:
                row[node.parent] = node.token
        sampled.append(row)
    walks = [
        walk(nodes, row, N) if nodes else ([], [])
        for nodes, row in zip(trees, sampled, strict=True)
    ]
    padded = [
        [ints([*x, *[EMPTY] * (N - len(x))]) for x in (tokens, path)]
        for tokens, path in walks
    ]
    tokens, paths = (torch.stack(column) for column in zip(*padded, strict=True))
    return Verdict(tokens, paths, ints([len(path) for _, path in walks]))


@pytest.mark.parametrize("position", [1, 2, 3, 14, 15, 16, 17, 40])
def test_what_a_step_leaves(ops, position):
    """In the new tail block, the path's behind those of the rejected nodes."""
    rng = random.Random(position)
    for sizes in ([1, 0], [2, 0], [5, 0], [12, 7], [30, 8]):
        pages = make_pages(9, BLOCK, 0, N)
        pages.answer_count[:] = torch.randint(0, 200, (9,))
        before = clone_pages(pages)
        rows, texts = [], []
        for blocks in ([5, 1, 7, 2], [0, 6, 3, 8]):
            at = position + len(rows)
            texts.append([rng.randrange(9) for _ in range(at)])
            write(ops, pages, blocks, texts[-1])
            rows.append(Row(blocks, at, 5))
        pages.answer_count[:] = before.answer_count
        trees = [random_ranked_tree(rng, *sizes) for _ in rows]
        tree = make_tree(trees)
        verdict = verdict_of(trees, tree, rng)
        answers = random_answers(tree, 50, position)
        counts = pages.answer_count.tolist()
        ops.keep_answers(pages, make_batch(rows), tree, verdict, answers)
        for b, (row, text) in enumerate(zip(rows, texts, strict=True)):
            count = int(verdict.num_emitted[b])
            tail = row.blocks[(row.position + count - 1) // BLOCK]
            path = verdict.path[b, :count].tolist()
            left = entries(trees[b], path, text)
            assert int(pages.answer_count[tail]) == counts[tail] + len(left)
            first = int(answers.first_row[b])
            for k, (context, node) in enumerate(left):
                cell = tail, (counts[tail] + k) % pages.answers.shape[1]
                wanted = [*context, *answers.tokens[first + node].tolist()]
                assert pages.answers[cell].tolist() == wanted
                logprobs = answers.logprobs[first + node]
                assert torch.equal(pages.answer_logprobs[cell], logprobs)
            counts[tail] += len(left)
        # Nothing of anybody else.
        assert pages.answer_count.tolist() == counts
        changed = (pages.answers != before.answers).flatten(1).any(1)
        assert {int(b) for b in changed.nonzero()} <= {
            row.blocks[(row.position + int(count) - 1) // BLOCK]
            for row, count in zip(rows, verdict.num_emitted, strict=True)
        }
        for name in ("ring", "ring_count", "window"):
            assert torch.equal(getattr(pages, name), getattr(before, name))


def test_only_the_likeliest_of_many_rejected_nodes_are_kept(ops):
    """The first of them, the first of all as the newest; and all of a path."""
    nodes = [Node(7, EMPTY, 0, ROOT)]
    nodes += [Node(20 + i, 0, 1, CANDIDATE) for i in range(MAX_REJECTED + 3)]
    nodes.append(Node(50, len(nodes) - 1, 2, CANDIDATE))  # below the last one
    nodes += [Node(60, 0, 1, WINDOW)] * 2
    pages = make_pages(1, 64, 0, N)
    write(ops, pages, [0], [3, 4])
    tree = make_tree([nodes])
    path = [0, MAX_REJECTED + 3, MAX_REJECTED + 4]
    verdict = Verdict(ints([[0] * N]), ints([[*path, EMPTY]]), ints([3]))
    answers = random_answers(tree, 50, 0)
    batch = make_batch([Row([0], 2, 7)])
    ops.keep_answers(pages, batch, tree, verdict, answers)
    contexts = [entry[:CONTEXT] for entry in kept(pages, 0)]
    rejected = [[20 + i, 7, 4] for i in range(MAX_REJECTED)]
    last = 20 + MAX_REJECTED + 2
    assert contexts == [*rejected[::-1], [7, 4, 3], [last, 7, 4], [50, last, 7]]


def test_a_tree_of_no_nodes_leaves_nothing(ops):
    """Padding of a batch: its block table and its rows are anyone's."""
    pages = make_pages(3, BLOCK, 0, N)
    for block in range(3):
        write(ops, pages, [block], [3, 4])
    trees = [chain([5]), [], chain([6])]
    tree = make_tree(trees)
    rng = random.Random(0)
    batch = make_batch([Row([0], 2, 7), Row([1], 2, 7), Row([2], 2, 7)])
    answers = random_answers(tree, 9, 0)
    answers.first_row[1] = 10_000
    verdict = verdict_of(trees, tree, rng)
    ops.keep_answers(pages, batch, tree, verdict, answers)
    assert pages.answer_count.tolist() == [2, 0, 2]


@pytest.mark.parametrize("block_size", [4, 16])
def test_the_oldest_are_overwritten(ops, block_size):
    """Over several turns of a ring: exactly the newest remain, in order."""
    pages = make_pages(2, block_size, 0, N)
    size = pages.answers.shape[1]
    assert size == block_size * ANSWERS_PER_SLOT
    write(ops, pages, [1], [7, 8])
    batch = make_batch([Row([1, 0], 2, 0)])
    tree = make_tree([chain([5, 6])])  # below 0
    verdict = Verdict(ints([[5, 1, 0, 0]]), ints([[0, 1, EMPTY, EMPTY]]), ints([2]))
    left: list[list[int]] = []
    for step in range(size):
        answers = random_answers(tree, 50, step)
        ops.keep_answers(pages, batch, tree, verdict, answers)
        first = int(answers.first_row[0])
        said = answers.tokens[first : first + 3].tolist()
        for context, row in (([6, 5, 0], 2), ([0, 8, 7], 0), ([5, 0, 8], 1)):
            left.append([*context, *said[row]])
        assert kept(pages, 1) == left[-size:]
    assert pages.answer_count.tolist() == [0, 3 * size]
    (request,) = batch.requests()
    read = reference.read_answers(pages, request)
    assert [answer.context for answer in read] == [e[:CONTEXT] for e in left[-size:]]
    assert [[*answer.successors] for answer in read] == [
        e[CONTEXT:] for e in left[-size:]
    ]


def take_step(
    ops: LookaheadOps, pages: BlockPages, row: Row, says: dict, **given
) -> Row:
    """A step in which the model says, after each token, what is told here.

    Args:
        says: after each token others, the likeliest first.
    """
    write(ops, pages, row.blocks, [row.root], row.position)
    batch = make_batch([row])
    tree = draft(ops, pages, batch, row.g, **given)
    size = int(tree.num_nodes[0])
    said = [says.get(token, [1]) for token in tree.tokens[0, :size].tolist()]
    tokens = ints([[*said_, *[EMPTY] * (NUM_ANSWERS - len(said_))] for said_ in said])
    sampled = torch.full(tree.tokens.shape, 1, dtype=torch.int32)
    sampled[0, :size] = tokens[:, 0]
    logprobs = (-1.0 - torch.arange(NUM_ANSWERS)).repeat(size, 1)
    verdict = ops.verify(tree, sampled, row.n)
    ops.update(pages, batch, tree, sampled, verdict)
    ops.keep_answers(pages, batch, tree, verdict, Answers(tokens, logprobs, ints([0])))
    count = int(verdict.num_emitted[0])
    root = int(verdict.tokens[0, count - 1])
    return Row(row.blocks, row.position + count, root, 0, row.n, row.g)


def test_what_was_said_after_a_rejected_node_is_drafted(ops):
    """12 was drafted after 11 and rejected; where it comes again, so does 30."""
    bigrams = torch.full((60, 1), EMPTY, dtype=torch.int32)
    bigrams[10], bigrams[11] = 11, 12
    known = {"bigrams": bigrams, "bigram_logprobs": torch.zeros(60, 1)}
    pages = make_pages(3, BLOCK, 0, N)
    row = Row([2, 0], 2, 10, g=8)
    write(ops, pages, row.blocks, [8, 9])
    row = take_step(ops, pages, row, {10: [40], 11: [41], 12: [30, 31]}, **known)
    assert (row.position, row.root) == (3, 40), "nothing was accepted"
    row = take_step(ops, pages, row, {40: [12]})
    assert row.root == 12
    found = candidates(ops, pages, row)
    assert list(found)[:2] == [(30,), (31,)]
    # Of one that was not drafted nothing is known.
    assert not candidates(ops, pages, Row([2, 0], row.position, 13, g=8))


def test_what_was_said_after_an_accepted_node_is_drafted(ops):
    pages = make_pages(3, BLOCK, 0, N)
    row = Row([2, 0], 2, 10, g=8)
    write(ops, pages, row.blocks, [8, 9])
    row = take_step(ops, pages, row, {10: [11, 21, 22]})
    row = take_step(ops, pages, row, {11: [10]})
    assert row.root == 10
    found = candidates(ops, pages, row)
    # 11 followed in the text as well, and on from it 10.
    assert [path for path in found if len(path) == 1] == [(11,), (21,), (22,)]
    assert (11, 10) in found


def test_answers_of_one_request_are_not_anothers(ops):
    """Of one batch, with the same text: each has its own from then on."""
    pages = make_pages(4, BLOCK, 0, N)
    rows = [Row([0, 1], 2, 10, g=8), Row([3, 2], 2, 10, g=8)]
    for row in rows:
        write(ops, pages, row.blocks, [8, 9, 10])
    batch = make_batch(rows)
    tree = draft(ops, pages, batch, 8)
    assert tree.num_nodes.tolist() == [1, 1]
    tokens = distinct_tokens(9, NUM_ANSWERS, 2) + ints([[20], [40]])
    answers = Answers(tokens, falling_logprobs(2, NUM_ANSWERS), ints([1, 0]))
    verdict = ops.verify(tree, tree.tokens, N)
    ops.keep_answers(pages, batch, tree, verdict, answers)
    for row, own in zip(rows, ([*range(40, 49)], [*range(20, 29)]), strict=True):
        again = Row(row.blocks, 3, 10, g=8)
        found = candidates(ops, pages, again)
        first = {path[0] for path in found if len(path) == 1}
        assert first <= {10, *own} and len(first) == 1 + NUM_ANSWERS


LIKELIEST = [reference.likeliest_tokens, numba_answers.likeliest_tokens]


@pytest.mark.parametrize("likeliest", LIKELIEST, ids=["reference", "numba"])
@pytest.mark.parametrize("vocab", [NUM_ANSWERS, 100, LANES])
def test_likeliest_tokens_of_a_small_vocabulary(likeliest, vocab):
    torch.manual_seed(vocab)
    logits = 3 * torch.randn(5, vocab)
    expected, ids = logits.log_softmax(-1).topk(NUM_ANSWERS)
    tokens, logprobs = likeliest(logits)
    assert torch.equal(tokens, ids.int())
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("likeliest", LIKELIEST, ids=["reference", "numba"])
def test_of_the_tokens_of_a_lane_the_likeliest_counts(likeliest):
    logits = torch.full((1, 2 * LANES + 5), -20.0)
    logits[0, 7], logits[0, 7 + LANES], logits[0, 7 + 2 * LANES - 4] = 3.0, 5.0, 4.0
    tokens, logprobs = likeliest(logits)
    assert tokens[0, :2].tolist() == [7 + LANES, 3 + 2 * LANES]
    lanes = torch.tensor([5.0, 4.0, *[-20.0] * (LANES - 2)])
    expected = lanes.log_softmax(0)[:2]
    torch.testing.assert_close(logprobs[0, :2], expected)


@pytest.mark.parametrize("likeliest", LIKELIEST, ids=["reference", "numba"])
def test_a_vocabulary_of_few_tokens(likeliest):
    tokens, logprobs = likeliest(torch.tensor([[1.0, 3.0, 2.0]]))
    assert tokens.tolist() == [[1, 2, 0, *[EMPTY] * (NUM_ANSWERS - 3)]]
    torch.testing.assert_close(logprobs[0, :3].exp().sum(), torch.tensor(1.0))
