# SPDX-License-Identifier: Apache-2.0
"""What holds on every state, however it came about."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.build import clone_pages, make_tree, path_to
from tests.core.equivalence import (
    Shape,
    State,
    assert_same_pages,
    random_caches,
    random_samples,
    random_state,
)
from tests.core.test_verify import assert_verdict, random_tree
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW
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
    empty_pool=st.booleans(),
    holes=st.booleans(),
    at_border=st.booleans(),
    same_sizes=st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)


def known_text(state: State, b: int) -> list[int]:
    """A request's history and root."""
    p, table = int(state.batch.position[b]), state.batch.block_table[b].long()
    history = state.pages.tokens[table].flatten()[:p].tolist()
    return [*history, int(state.batch.root[b])]


def known_ngrams(state: State, b: int) -> list[list[int]]:
    """(key, values...) that lie in the request's own pages."""
    size = state.pages.block_size
    text = known_text(state, b)
    grams = [text[i : i + state.n] for i in range(len(text))]
    blocks = state.batch.block_table[b, : -(-(len(text) - 1) // size)].long()
    return grams + state.pages.ring[blocks][..., 1:].flatten(0, 1).tolist()


@examples
@given(shape=shapes, seed=seeds)
def test_a_proposal_is_a_tree_of_known_ngrams(shape, seed):
    state = random_state(shape, seed)
    before = clone_pages(state.pages)
    tree = ReferenceOps.propose(state.pages, state.batch, state.g)
    assert_same_pages(state.pages, before)
    batch = state.batch
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
        known = known_ngrams(state, b)
        for i, node in enumerate(nodes[1:], 1):
            assert 0 <= node.parent < i
            assert node.depth == nodes[node.parent].depth + 1
            assert 0 <= node.token < shape.vocab
            if node.kind == WINDOW:
                assert node.depth <= w - 1 + n - 2
                continue
            assert node.kind == CANDIDATE and node.depth <= n - 1
            assert (node.parent, node.token) not in siblings
            siblings.add((node.parent, node.token))
            branch = [nodes[k].token for k in path_to(nodes, i)]
            assert any(gram[: len(branch)] == branch for gram in known)
        num_window = sum(node.kind == WINDOW for node in nodes)
        assert num_window in (0, w * (n - 1) - 1)
        assert [node.kind for node in nodes] == sorted(node.kind for node in nodes)


@examples
@given(shape=shapes, seed=seeds)
def test_an_update_writes_only_what_is_its_own(ops, shape, seed):
    state = random_state(shape, seed)
    batch, pages, size = state.batch, state.pages, state.pages.block_size
    tree = ops.propose(pages, batch, state.g)
    sampled = random_samples(tree, shape.vocab, seed)
    verdict = ops.verify(tree, sampled, state.n)
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


@examples
@given(shape=shapes, seed=seeds)
def test_a_verdict_is_a_path_of_matches(ops, shape, seed):
    state = random_state(shape, seed)
    tree = ops.propose(state.pages, state.batch, state.g)
    sampled = random_samples(tree, shape.vocab, seed)
    verdict = ops.verify(tree, sampled, state.n)
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
    state = random_state(shape, seed)
    batch, size = state.batch, state.pages.block_size
    tree = ops.propose(state.pages, batch, state.g)
    sampled = random_samples(tree, shape.vocab, seed)
    verdict = ops.verify(tree, sampled, state.n)
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
