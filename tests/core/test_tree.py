# SPDX-License-Identifier: Apache-2.0
"""The draft tree against its definition, exhaustively.

Candidates reach the tree as a user's do, through the pages: they are put into the
ring of the request's block, so that `propose` finds them.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch

from tests.core.build import (
    Row,
    make_batch,
    make_pages,
    path_to,
    put_in_ring,
    write,
)
from tests.core.plain_python import draft_tree
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree, Node
from vllm_lookahead.params import LookaheadParams

BLOCK = 16
ROOT_TOKEN, BEFORE = 7, 9  # occur once in each history
UNLIMITED = 10_000


def window_token(r: int, j: int) -> int:
    return 1000 + 100 * r + j


def propose(
    w: int,
    n: int,
    g: int,
    candidate_sets: Sequence[Sequence[Sequence[int]]],
    rows: Sequence[dict] = ({},),
) -> tuple[DraftTree, list[Row]]:
    """One tree per candidate set (best first) and per row of sizes."""
    jobs = list(itertools.product(candidate_sets, rows))
    # At least one column: a page without a window has no ring.
    pages = make_pages(len(jobs), BLOCK, max(w, 1), n)
    batch = []
    for block, (chains, sizes) in enumerate(jobs):
        write(ReferenceOps(), pages, [block], [3, 4, BEFORE])
        ngrams = [(BEFORE, ROOT_TOKEN, *chain) for chain in chains]
        put_in_ring(pages, block, ngrams[::-1])
        row = {"position": 3, "root": ROOT_TOKEN, "w": w, "n": n, "g": g, **sizes}
        batch.append(Row([block], **row))
    cells = [[window_token(r, j) for j in range(max(w, 1))] for r in range(n - 1)]
    pages.window[:] = torch.tensor(cells, dtype=torch.int32)
    return ReferenceOps.propose(pages, make_batch(batch), g), batch


def some_chains(g: int, n: int) -> list[list[int]]:
    """G chains of N-1 tokens with no token in common."""
    return [[10 * (c + 1) + k for k in range(n - 1)] for c in range(g)]


def assert_is_tree(nodes: Sequence[Node]) -> None:
    assert nodes[0][1:] == (EMPTY, 0, ROOT)
    for i, node in enumerate(nodes[1:], 1):
        # Parents come first, so every prefix of the list is a tree as well.
        assert 0 <= node.parent < i
        assert node.depth == nodes[node.parent].depth + 1
        assert node.kind in (CANDIDATE, WINDOW)
    kinds = [node.kind for node in nodes]
    assert kinds == sorted(kinds), "root, candidates, window"


SMALL = list(itertools.product(range(5), range(2, 6), range(4)))


@pytest.mark.parametrize("w, n, g", SMALL)
def test_positions_and_mask_by_definition(w, n, g):
    chains = some_chains(g, n)
    tree, _ = propose(w, n, g, [chains])
    (nodes,) = tree.nodes()
    mask = ancestors(tree)[0]

    # By name: the root is window node (0, 0); a candidate is (chain, its index).
    window = [("window", r, j) for r in range(n - 1) for j in range(w)]
    names = [("window", 0, 0)]
    names += [("candidate", c, k) for c in range(g) for k in range(n - 1)]
    names += [name for name in window if name != names[0]]
    assert len(nodes) == len(names)
    index = {name: i for i, name in enumerate(names)}
    for name, node in zip(names, nodes, strict=True):
        kind, a, b = name
        if kind == "candidate":
            assert node.token == chains[a][b]
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
def test_full_size(w, n, g):
    tree, _ = propose(w, n, g, [some_chains(g, n)])
    size = (n - 1) * (w + g) if w else 1 + (n - 1) * g
    assert tree.num_nodes.tolist() == [size]
    assert LookaheadParams(w, n, g).max_tree_size == size
    # The pages of w = 0 have a column here, for the sake of their ring.
    assert tree.tokens.shape[1] == (size if w else size + n - 2)


# All chains over two tokens, in all sets of one and two, and of three short ones.
CHAINS = [c for k in (1, 2, 3) for c in itertools.product((1, 2), repeat=k)]
CANDIDATE_SETS = [
    *itertools.product(CHAINS),
    *itertools.product(CHAINS, repeat=2),
    *itertools.product(CHAINS[:6], repeat=3),
]


@pytest.mark.parametrize("w", [0, 1, 3])
def test_candidates_merge_where_prefixes_agree(w):
    tree, _ = propose(w, 4, 3, CANDIDATE_SETS)
    mask = ancestors(tree)
    for b, (nodes, chains) in enumerate(zip(tree.nodes(), CANDIDATE_SETS, strict=True)):
        assert_is_tree(nodes)
        wanted = {chain[: k + 1] for chain in chains for k in range(len(chain))}
        branches = {}
        for i, node in enumerate(nodes):
            if node.kind != CANDIDATE:
                continue
            path = path_to(nodes, i)
            assert mask[b, i].nonzero().flatten().tolist() == path
            branch = tuple(nodes[k].token for k in path[1:])
            assert branch not in branches, "one node per prefix"
            branches[branch] = i
        assert set(branches) == wanted
        assert len(nodes) == len(wanted) + (3 * w if w else 1)


@pytest.mark.parametrize("w, n, g", [(0, 4, 3), (1, 2, 2), (3, 4, 3), (4, 3, 0)])
def test_every_size_limit(w, n, g):
    """`max_nodes` cuts candidates anywhere, and the window only as a whole."""
    full = LookaheadParams(w, n, g).max_tree_size
    rows = [{"max_nodes": limit} for limit in range(1, full + 3)]
    tree, batch = propose(w, n, g, [some_chains(g, n)], rows)
    window = [[window_token(r, j) for j in range(w)] for r in range(n - 1)]
    trees = tree.nodes()
    for row, nodes in zip(batch, trees, strict=True):
        assert_is_tree(nodes)
        assert len(nodes) <= row.max_nodes
        num_window = sum(node.kind == WINDOW for node in nodes)
        fits = row.max_nodes >= full
        assert num_window == (max(0, w * (n - 1) - 1) if fits else 0)
        assert nodes == draft_tree(row, some_chains(g, n), window)
    assert len(trees[-1]) == full


def test_a_window_fits_where_candidates_are_few():
    window_only = (4 - 1) * 3
    rows = [{"max_nodes": limit} for limit in (window_only + 1, window_only + 2)]
    tree, _ = propose(3, 4, 3, [[(1, 2)]], rows)
    assert tree.num_nodes.tolist() == [3, window_only + 2]


def test_each_request_has_its_own_sizes():
    w, n, g = 4, 5, 3
    names = ("w", "n", "g", "max_nodes")
    sizes = itertools.product(range(5), range(2, 6), range(4), (3, UNLIMITED))
    rows = [dict(zip(names, size, strict=True)) for size in sizes]
    tree, batch = propose(w, n, g, [some_chains(g, n)], rows)
    window = [[window_token(r, j) for j in range(w)] for r in range(n - 1)]
    for row, nodes in zip(batch, tree.nodes(), strict=True):
        assert_is_tree(nodes)
        chains = [c[: row.n - 1] for c in some_chains(g, n)[: row.g]]
        assert nodes == draft_tree(row, chains, window)
        if row.max_nodes == UNLIMITED:
            size = LookaheadParams(row.w, row.n, row.g).max_tree_size
            assert len(nodes) == size


def test_padding_is_inert():
    """Beyond `num_nodes`: no token, no parent, no candidate, seen by nobody."""
    tree, _ = propose(3, 4, 3, [[(1, 2)], some_chains(3, 4)], [{"w": 0}])
    small = int(tree.num_nodes[0])
    assert small == 3
    assert (tree.tokens[0, small:] == EMPTY).all()
    assert (tree.parents[0, small:] == EMPTY).all()
    assert (tree.kinds[0, small:] != CANDIDATE).all()
    assert (tree.kinds[0, small:] != WINDOW).all()
    sees = ancestors(tree)[0]
    assert not sees[:small, small:].any()
    assert not sees[small:, :small].any()
