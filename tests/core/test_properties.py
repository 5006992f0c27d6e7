# SPDX-License-Identifier: Apache-2.0
"""What holds on every state, however it came about."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.build import clone_pages, make_tree, path_to
from tests.core.equivalence import (
    Shape,
    State,
    assert_same_pages,
    random_answers,
    random_caches,
    random_hints,
    random_samples,
    random_state,
)
from tests.core.test_verify import assert_verdict, random_tree
from vllm_lookahead.core.answers import MAX_REJECTED
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import CONTEXT, EMPTY
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams

examples = settings(max_examples=60, deadline=None, derandomize=True)

shapes = st.builds(
    Shape,
    w=st.integers(0, 6),
    n=st.integers(2, 6),
    g=st.integers(0, 6),
    batch=st.integers(1, 5),
    block_size=st.sampled_from([16, 32]),
    num_blocks=st.integers(1, 4),
    vocab=st.integers(1, 8),
    empty_rings=st.booleans(),
    holes=st.booleans(),
    at_border=st.booleans(),
    same_sizes=st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)


def drafted(
    ops: LookaheadOps, shape: Shape, seed: int
) -> tuple[State, DraftTree, torch.Tensor]:
    """A random state, and the trees and chances that are drafted from it."""
    state = random_state(shape, seed)
    hints = random_hints(shape, state.n, seed)
    return state, *ops.draft(state.pages, state.batch, hints, state.g)


def verified(
    ops: LookaheadOps, shape: Shape, seed: int
) -> tuple[State, DraftTree, torch.Tensor, Verdict]:
    """Those, with random samples after the nodes, and what is emitted of them."""
    state, tree, _ = drafted(ops, shape, seed)
    sampled = random_samples(tree, shape.vocab, seed)
    return state, tree, sampled, ops.verify(tree, sampled, state.n)


def known_pairs(state: State, b: int, bigrams: torch.Tensor) -> set[tuple[int, int]]:
    """(token, what may follow it) by a request's own pages and the bigrams."""
    pages, size = state.pages, state.pages.block_size
    p, table = int(state.batch.position[b]), state.batch.block_table[b].tolist()
    blocks = table[: -(-p // size)]
    texts = [[*pages.tokens[blocks].flatten()[:p].tolist(), int(state.batch.root[b])]]
    for block in blocks:
        texts += [gram[1:] for gram in pages.ngrams(block)]
        answers = pages.answers[block, : int(pages.answer_count[block])]
        for context, *entry in answers.tolist():
            texts += [[context, token] for token in entry[CONTEXT - 1 :]]
    for token, successors in enumerate(bigrams.tolist()):
        texts += [[token, successor] for successor in successors]
    return {pair for text in texts for pair in itertools.pairwise(text)}


@examples
@given(shape=shapes, seed=seeds)
def test_a_draft_is_a_tree_of_what_is_known_to_follow(ops, shape, seed):
    state = random_state(shape, seed)
    before = clone_pages(state.pages)
    hints = random_hints(shape, state.n, seed)
    tree, chances = ops.draft(state.pages, state.batch, hints, state.g)
    assert_same_pages(state.pages, before)
    batch = state.batch
    assert (chances.isfinite() & (chances >= 0) & (chances <= 1)).all()
    for b, nodes in enumerate(tree.nodes()):
        w, n, g = (
            int(size[b])
            for size in (
                batch.window_size,
                batch.ngram_size,
                batch.verification_set_size,
            )
        )
        own_size = LookaheadParams(w, n, g).max_tree_size
        assert 1 <= len(nodes) <= min(own_size, int(batch.max_nodes[b]))
        assert nodes[0] == (int(batch.root[b]), EMPTY, 0, ROOT)
        siblings = set()
        known = known_pairs(state, b, hints.bigrams)
        for i, node in enumerate(nodes[1:], 1):
            assert 0 <= node.parent < i
            assert node.depth == nodes[node.parent].depth + 1
            assert 0 <= node.token < shape.vocab
            if node.kind == WINDOW:
                assert node.depth <= w - 1 + n - 2 and chances[b, i] == 0
                continue
            assert node.kind == CANDIDATE and node.depth <= n - 1
            assert (node.parent, node.token) not in siblings
            siblings.add((node.parent, node.token))
            assert (nodes[node.parent].token, node.token) in known
            assert chances[b, i] >= hints.least * (1 - 1e-6)
            assert not node.parent or chances[b, i] <= chances[b, node.parent]
        for depth in range(1, n):
            level = [x for x in nodes if x.kind == CANDIDATE and x.depth == depth]
            assert len(level) <= g
        num_window = sum(node.kind == WINDOW for node in nodes)
        assert num_window in (0, w * (n - 1) - 1)
        assert [node.kind for node in nodes] == sorted(node.kind for node in nodes)


@examples
@given(shape=shapes, seed=seeds)
def test_an_update_writes_only_what_is_its_own(ops, shape, seed):
    state, tree, sampled, verdict = verified(ops, shape, seed)
    batch, pages, size = state.batch, state.pages, state.pages.block_size
    before = clone_pages(pages)
    ops.update(pages, batch, tree, sampled, verdict)

    written, touched = set(), set()
    for b, (p, count) in enumerate(
        zip(batch.position.tolist(), verdict.num_emitted.tolist(), strict=True)
    ):
        table = batch.block_table[b].tolist()
        for at in range(p + 1, p + count):
            written.add((table[at // size], at % size))
            if at % size == 0:
                touched.add(table[at // size])  # a fresh block starts empty
            emitted = verdict.tokens[b, at - p - 1]
            assert pages.tokens[table[at // size], at % size] == emitted
        tail = table[(p + count - 1) // size]
        num_window = int((tree.kinds[b] == WINDOW).sum())
        w, rows = int(batch.window_size[b]), int(batch.ngram_size[b]) - 1
        if w and num_window == w * rows - 1:
            start = 0 if tail in touched else int(before.ring_count[tail])
            assert pages.ring_count[tail] == start + w
            touched.add(tail)
        elif w and tail != (old_tail := table[(p - 1) // size]):
            assert torch.equal(pages.window[tail], before.window[old_tail])
            if tail not in touched:  # its window was written, its ring was not
                assert torch.equal(pages.ring[tail], before.ring[tail])
                touched.add(tail)
    changed = (pages.tokens != before.tokens).nonzero().tolist()
    assert {tuple(slot) for slot in changed} <= written
    rest = [block for block in range(len(pages.tokens)) if block not in touched]
    for name in ("ring", "ring_count", "window"):
        assert torch.equal(getattr(pages, name)[rest], getattr(before, name)[rest])
    emptied = {table for table, offset in written if offset == 0}
    for block, count in enumerate(pages.answer_count.tolist()):
        assert count == (0 if block in emptied else before.answer_count[block])
    assert torch.equal(pages.answers, before.answers)


@examples
@given(shape=shapes, seed=seeds)
def test_answers_are_kept_in_the_new_tail_block_alone(ops, shape, seed):
    state, tree, sampled, verdict = verified(ops, shape, seed)
    batch, pages, size = state.batch, state.pages, state.pages.block_size
    ops.update(pages, batch, tree, sampled, verdict)
    before = clone_pages(pages)
    answers = random_answers(tree, shape.vocab, seed)
    ops.keep_answers(pages, batch, tree, verdict, answers)
    for name in ("tokens", "ring", "ring_count", "window"):
        assert torch.equal(getattr(pages, name), getattr(before, name))
    more = pages.answer_count - before.answer_count
    tails = set()
    for b, (p, count) in enumerate(
        zip(batch.position.tolist(), verdict.num_emitted.tolist(), strict=True)
    ):
        tail = int(batch.block_table[b, (p + count - 1) // size])
        tails.add(tail)
        num_candidates = int((tree.kinds[b] == CANDIDATE).sum())
        rejected = num_candidates - (count - 1)
        assert more[tail] == count + min(rejected, MAX_REJECTED)
        # The newest one is of the last node of the path.
        newest = (int(pages.answer_count[tail]) - 1) % pages.answers.shape[1]
        row = int(answers.first_row[b] + verdict.path[b, count - 1])
        said = pages.answers[tail, newest]
        assert said[0] == tree.tokens[b, verdict.path[b, count - 1]]
        assert torch.equal(said[CONTEXT:], answers.tokens[row])
        logprobs = pages.answer_logprobs[tail, newest]
        assert torch.equal(logprobs, answers.logprobs[row])
    rest = [block for block in range(len(pages.tokens)) if block not in tails]
    for name in ("answers", "answer_logprobs", "answer_count"):
        assert torch.equal(getattr(pages, name)[rest], getattr(before, name)[rest])


@examples
@given(shape=shapes, seed=seeds)
def test_a_verdict_is_a_path_of_matches(ops, shape, seed):
    state, tree, sampled, verdict = verified(ops, shape, seed)
    trees = tree.nodes()
    assert_verdict(verdict, trees, sampled, state.n)
    for b, nodes in enumerate(trees):
        count = int(verdict.num_emitted[b])
        assert 1 <= count <= int(state.batch.ngram_size[b]) <= state.n
        path = verdict.path[b, :count].tolist()
        assert path == path_to(nodes, path[-1])
        # Never below its target: moves are safe in place.
        assert all(node >= depth for depth, node in enumerate(path))


@examples
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    vocab=st.integers(1, 6),
    max_emitted=st.integers(2, 16),
    rng=st.randoms(use_true_random=False),
)
def test_the_walk_on_any_tree(ops, sizes, vocab, max_emitted, rng):
    trees = [random_tree(rng, size, vocab) for size in sizes]
    tree = make_tree(trees)
    sampled = random_samples(tree, vocab, rng.randrange(2**32))
    assert_verdict(ops.verify(tree, sampled, max_emitted), trees, sampled, max_emitted)


@examples
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rng=st.randoms(use_true_random=False),
)
def test_a_node_sees_its_ancestors(sizes, rng):
    trees = [random_tree(rng, size, 5) for size in sizes]
    tree = make_tree(trees)
    sees = ancestors(tree).tolist()
    for b, nodes in enumerate(trees):
        for i in range(max(sizes)):
            path = path_to(nodes, i) if i < len(nodes) else [i]
            assert sees[b][i] == [j in path for j in range(max(sizes))]


@examples
@given(shape=shapes, seed=seeds)
def test_compaction_keeps_other_slots(ops, shape, seed):
    state, tree, sampled, verdict = verified(ops, shape, seed)
    batch, size = state.batch, state.pages.block_size
    torch.manual_seed(0)
    caches = random_caches(len(state.pages.tokens), size)
    expected = [cache.clone() for cache in caches]
    for b, p in enumerate(batch.position.tolist()):
        table = batch.block_table[b].tolist()
        path = verdict.path[b, : verdict.num_emitted[b]].tolist()
        for depth, node in enumerate(path):
            src, dst = p + node, p + depth
            for cache, after in zip(caches, expected, strict=True):
                value = cache[table[src // size], src % size]
                after[table[dst // size], dst % size] = value
    ops.compact(caches, batch, verdict, size)
    for cache, after in zip(caches, expected, strict=True):
        assert torch.equal(cache, after)
