# SPDX-License-Identifier: Apache-2.0
"""The draft tree against its definition, exhaustively.

What is drafted comes as a model says it: chains by its bigrams, branches by the answers
in the page of the request's block.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.core.build import (
    Row,
    make_batch,
    make_hints,
    make_pages,
    path_to,
    put_answers,
    write,
)
from tests.core.plain_python import chances_of, draft_tree
from vllm_lookahead.core.draft.estimate import FLOOR, WEIGHTS, Hints
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree, Node
from vllm_lookahead.params import LookaheadParams

BLOCK = 16
TEXT = [3, 4, 9, 7]  # the root last; none of it is drafted
UNLIMITED = 10_000

Branch = tuple[int, ...]


def window_token(r: int, j: int) -> int:
    return 1000 + 100 * r + j


def window_rows(w: int, n: int) -> list[list[int]]:
    return [[window_token(r, j) for j in range(w)] for r in range(n - 1)]


def draft(
    ops: LookaheadOps,
    w: int,
    n: int,
    g: int,
    hints: Hints,
    rows: Sequence[dict[str, Any]] = ({},),
    tries: Sequence[set[Branch]] = (),
) -> tuple[DraftTree, torch.Tensor, list[Row]]:
    """A tree for each row of sizes; of each trie, too, where some are given."""
    jobs = list(itertools.product(tries or [set()], rows))
    pages = make_pages(len(jobs), BLOCK, w, n)
    batch = []
    for block, (trie, sizes) in enumerate(jobs):
        write(ReferenceOps(), pages, [block], TEXT[:-1])
        if tries:
            put_answers(pages, block, answers_of(trie, n))
        row = {"position": 3, "root": TEXT[-1], "w": w, "n": n, "g": g, **sizes}
        batch.append(Row([block], **row))
    pages.window[:] = torch.tensor(window_rows(w, n), dtype=torch.int32)
    hints.temperature = torch.zeros(len(jobs))
    hints.seeds = torch.zeros(len(jobs), n - 1, dtype=torch.int64)
    return *ops.draft(pages, make_batch(batch), hints, g), batch


def some_chains(g: int, n: int) -> list[list[int]]:
    """G chains of N-1 tokens with no token in common."""
    return [[10 * (c + 1) + k for k in range(n - 1)] for c in range(g)]


def bigrams_of(chains: Sequence[Sequence[int]]) -> Hints:
    """By which the root is followed by the chains, the likeliest first."""
    bigrams = torch.full((100, max(1, len(chains))), EMPTY, dtype=torch.int32)
    logprobs = torch.zeros(bigrams.shape)
    for c, chain in enumerate(chains):
        bigrams[TEXT[-1], c], logprobs[TEXT[-1], c] = chain[0], -0.1 * c
        for token, following in itertools.pairwise(chain):
            bigrams[token, 0], logprobs[token, 0] = following, -0.2
    return make_hints(bigrams=bigrams, bigram_logprobs=logprobs)


def chain_chances(chains: Sequence[Sequence[int]]) -> dict[Branch, float]:
    """Of each branch of the chains that `bigrams_of` makes, by hand."""

    def chance(logprobs: list[float]) -> list[float]:
        scores = [WEIGHTS["bigram"] * (x - FLOOR) for x in logprobs]
        return chances_of(scores, WEIGHTS["other"])

    first = chance([-0.1 * c for c in range(len(chains))])
    (then,) = chance([-0.2])
    return {
        tuple(chain[: k + 1]): p * then**k
        for chain, p in zip(chains, first, strict=True)
        for k in range(len(chain))
    }


def answers_of(trie: set[Branch], n: int) -> list[tuple[list[int], dict[int, float]]]:
    """By which the root is followed by exactly these branches over 1 and 2."""
    return [
        ([*TEXT, *path], {t: -t / 2 for t in (1, 2) if (*path, t) in trie})
        for path in sorted({(), *trie})
        if len(path) < n - 1
    ]


def assert_is_tree(nodes: Sequence[Node]) -> None:
    assert nodes[0][1:] == (EMPTY, 0, ROOT)
    siblings = set()
    for i, node in enumerate(nodes[1:], 1):
        # Parents come first, so every prefix of the list is a tree as well.
        assert 0 <= node.parent < i
        assert node.depth == nodes[node.parent].depth + 1
        assert node.kind in (CANDIDATE, WINDOW)
        if node.kind == CANDIDATE:
            assert (node.parent, node.token) not in siblings, "one node per prefix"
            siblings.add((node.parent, node.token))
    kinds = [node.kind for node in nodes]
    assert kinds == sorted(kinds), "root, candidates, window"


SMALL = list(itertools.product(range(5), range(2, 6), range(4)))


@pytest.mark.parametrize("w, n, g", SMALL)
def test_positions_and_mask_by_definition(ops, w, n, g):
    chains = some_chains(g, n)
    tree, _, _ = draft(ops, w, n, g, bigrams_of(chains))
    (nodes,) = tree.nodes()
    mask = ancestors(tree)[0]

    # By name: the root is window node (0, 0); a candidate is (chain, its index).
    candidates = {
        chains[c][k]: ("candidate", c, k) for c in range(g) for k in range(n - 1)
    }
    names = [("window", 0, 0)]
    names += [candidates[node.token] for node in nodes[1 : 1 + len(candidates)]]
    names += [("window", r, j) for r in range(n - 1) for j in range(w) if r or j]
    assert len(nodes) == len(names) == len(set(names))
    index = {name: i for i, name in enumerate(names)}
    for name, node in zip(names, nodes, strict=True):
        kind, a, b = name
        if kind == "candidate":
            depth = b + 1
            sees = {names[0], *(("candidate", a, k) for k in range(b + 1))}
        else:
            assert name == names[0] or node.token == window_token(a, b)
            depth = a + b
            sees = {("window", 0, j) for j in range(b + 1)}
            sees |= {("window", r, b) for r in range(1, a + 1)}
        assert node.depth == depth
        assert len(sees) == depth + 1
        row = mask[index[name]]
        assert row.nonzero().flatten().tolist() == sorted(index[s] for s in sees)


@pytest.mark.parametrize("w, n, g", SMALL)
def test_full_size(ops, w, n, g):
    tree, chances, _ = draft(ops, w, n, g, bigrams_of(some_chains(g, n)))
    size = (n - 1) * (w + g) if w else 1 + (n - 1) * g
    assert tree.num_nodes.tolist() == [size]
    assert LookaheadParams(w, n, g).max_tree_size == size
    assert tree.tokens.shape == chances.shape == (1, size)


def all_tries(depth: int) -> list[set[Branch]]:
    """All sets of branches over the tokens 1 and 2, with the prefixes of each."""
    if not depth:
        return [set()]
    below = [None, *all_tries(depth - 1)]
    return [
        {
            (token, *branch)
            for token, trie in ((1, one), (2, two))
            if trie is not None
            for branch in [(), *trie]
        }
        for one, two in itertools.product(below, repeat=2)
    ]


TRIES = all_tries(3)


@pytest.mark.parametrize("w", [0, 1, 3])
def test_every_tree_over_two_tokens(ops, w):
    assert len(TRIES) == 26**2
    tree, chances, _ = draft(ops, w, 4, 8, make_hints(), tries=TRIES)
    mask = ancestors(tree)
    for b, (nodes, trie) in enumerate(zip(tree.nodes(), TRIES, strict=True)):
        assert_is_tree(nodes)
        branches = []
        for i, node in enumerate(nodes):
            if node.kind != CANDIDATE:
                assert chances[b, i] == 0
                continue
            path = path_to(nodes, i)
            assert mask[b, i].nonzero().flatten().tolist() == path
            branches.append(tuple(nodes[k].token for k in path[1:]))
            assert 0 < chances[b, i] < chances[b, node.parent] or not node.parent
        assert sorted(branches) == sorted(trie)
        assert len(nodes) == len(trie) + (3 * w if w else 1)
        of_candidates = chances[b, 1 : 1 + len(trie)]
        assert torch.equal(of_candidates, of_candidates.sort(descending=True).values)


@pytest.mark.parametrize("w", [0, 3])
def test_a_tree_cut_short_is_the_beginning_of_it(ops, w):
    whole, chances, _ = draft(ops, w, 4, 8, make_hints(), tries=TRIES)
    uncut = whole.nodes()
    for limit in (2, 3, 7, 11, 14, 20):
        rows = [{"max_nodes": limit}]
        cut, own_chances, _ = draft(ops, w, 4, 8, make_hints(), rows, TRIES)
        for b, (nodes, trie) in enumerate(zip(cut.nodes(), TRIES, strict=True)):
            fits = len(uncut[b]) <= limit  # the window with the rest
            size = len(uncut[b]) if fits else min(limit, 1 + len(trie))
            assert nodes == uncut[b][:size]
            assert torch.equal(own_chances[b, :size], chances[b, :size])
            assert not own_chances[b, size:].any()


@pytest.mark.parametrize("w, n, g", [(0, 4, 3), (1, 2, 2), (3, 4, 3), (4, 3, 0)])
def test_every_size_limit(ops, w, n, g):
    """`max_nodes` cuts candidates anywhere, and the window only as a whole."""
    full = LookaheadParams(w, n, g).max_tree_size
    rows = [{"max_nodes": limit} for limit in range(1, full + 3)]
    chains = some_chains(g, n)
    tree, _, batch = draft(ops, w, n, g, bigrams_of(chains), rows)
    trees = tree.nodes()
    for row, nodes in zip(batch, trees, strict=True):
        assert_is_tree(nodes)
        assert len(nodes) <= row.max_nodes
        num_window = sum(node.kind == WINDOW for node in nodes)
        fits = row.max_nodes >= full
        assert num_window == (max(0, w * (n - 1) - 1) if fits else 0)
        assert nodes == draft_tree(row, chain_chances(chains), window_rows(w, n))
    assert len(trees[-1]) == full


def test_a_window_fits_where_candidates_are_few(ops):
    window_only = (4 - 1) * 3
    rows = [{"max_nodes": limit} for limit in (window_only + 1, window_only + 2)]
    tree, _, _ = draft(ops, 3, 4, 3, bigrams_of([(1, 2)]), rows)
    assert tree.num_nodes.tolist() == [3, window_only + 2]


def test_each_request_has_its_own_sizes(ops):
    w, n, g = 4, 5, 3
    names = ("w", "n", "g", "max_nodes")
    sizes = itertools.product(range(5), range(2, 6), range(4), (3, UNLIMITED))
    rows = [dict(zip(names, size, strict=True)) for size in sizes]
    chains = some_chains(g, n)
    tree, _, batch = draft(ops, w, n, g, bigrams_of(chains), rows)
    chances = chain_chances(chains)
    for row, nodes in zip(batch, tree.nodes(), strict=True):
        assert_is_tree(nodes)
        own = {
            tuple(chain[: k + 1]): chances[tuple(chain[: k + 1])]
            for chain in chains[: row.g]
            for k in range(row.n - 1)
        }
        assert nodes == draft_tree(row, own, window_rows(w, n))
        if row.max_nodes == UNLIMITED:
            size = LookaheadParams(row.w, row.n, row.g).max_tree_size
            assert len(nodes) == size


def test_padding_is_inert(ops):
    """Beyond `num_nodes`: no token, no parent, no candidate, seen by nobody."""
    tries = [{(1,), (1, 2)}, set(TRIES[-1])]
    tree, chances, _ = draft(ops, 3, 4, 3, make_hints(), [{"w": 0}], tries)
    small, large = tree.num_nodes.tolist()
    assert small == 3 < large
    assert (tree.tokens[0, small:] == EMPTY).all()
    assert (tree.parents[0, small:] == EMPTY).all()
    assert (tree.kinds[0, small:] != CANDIDATE).all()
    assert (tree.kinds[0, small:] != WINDOW).all()
    assert not chances[0, small:].any()
    sees = ancestors(tree)[0]
    assert not sees[:small, small:].any()
    assert not sees[small:, :small].any()
