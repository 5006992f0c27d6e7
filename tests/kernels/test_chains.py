# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.core.build import Row, make_batch, make_pages
from tests.core.equivalence import Shape, assert_same_trees, random_state
from tests.kernels.build import POISON, poison_table, poisoned
from vllm_lookahead.core.draft.chains import merge
from vllm_lookahead.core.draft.pool import until_empty
from vllm_lookahead.core.draft.window import add_window, read_window
from vllm_lookahead.core.tree import ROOT, DraftTree
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.chains import build_tree


def empty_tree(b: int, t: int) -> DraftTree:
    return DraftTree(*(poisoned(b, t) for _ in range(4)), poisoned(b))


def random_chains(b: int, g: int, k: int, vocab: int) -> torch.Tensor:
    """Chains with long common prefixes, of any length, none too."""
    chains = torch.randint(0, vocab, (b, g, k), dtype=torch.int32)
    length = torch.randint(0, k + 1, (b, g, 1))
    return chains.masked_fill(torch.arange(k) >= length, -1)


def reference(pages, batch, candidates, size):
    trees = []
    for request, chains in zip(batch.requests(), candidates.tolist(), strict=True):
        nodes = merge([until_empty(chain) for chain in chains], request)
        window = read_window(pages, request)
        trees.append(add_window(nodes, window, request.max_nodes))
    return DraftTree.of(trees, size)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 0, batch=1),
        Shape(1, 2, 0, same_sizes=True),
        Shape(1, 2, 1),
        Shape(0, 5, 6, vocab=2),
        Shape(7, 2, 0),
        Shape(1, 6, 2, at_border=True),
        Shape(5, 4, 5, batch=5, vocab=2),
        Shape(15, 5, 15, batch=4, vocab=3),
        Shape(20, 8, 20, batch=2, vocab=2, same_sizes=True),
        Shape(20, 3, 4, block_size=8, holes=True),
    ],
)
def test_same_as_the_reference(shape):
    params = LookaheadParams(shape.w, shape.n, shape.g)
    for seed in range(3):
        state = random_state(shape, seed)
        pages, batch = state.pages, state.batch
        b = shape.batch
        candidates = random_chains(b, shape.g, shape.n - 1, shape.vocab)
        expected = reference(pages, batch, candidates, params.max_tree_size)
        tree = empty_tree(b, params.max_tree_size)
        batch = poison_table(batch, pages.block_size, ahead=-1)
        build_tree(pages, batch, candidates, tree)
        assert_same_trees(expected, tree)
        for name in ("tokens", "parents", "depths", "kinds"):
            assert torch.equal(getattr(expected, name), getattr(tree, name)), name


def test_padding_has_no_node_and_reads_nothing():
    pages = make_pages(2, 16, 3, 4)
    row = Row([POISON], POISON, POISON, w=0, g=0, max_nodes=0)
    tree = empty_tree(1, LookaheadParams(3, 4, 2).max_tree_size)
    chains = torch.full((1, 2, 3), -1, dtype=torch.int32)
    build_tree(pages, make_batch([row]), chains, tree)
    assert tree.num_nodes.tolist() == [0]
    assert (tree.tokens == -1).all()
    assert (tree.kinds == ROOT).all()


def test_the_first_root_has_no_history():
    """Position 0: nothing to seed the window with but the root."""
    pages = make_pages(2, 16, 3, 4)
    row = Row([1], 0, 42, w=3, n=4, g=0)
    tree = empty_tree(1, LookaheadParams(3, 4, 0).max_tree_size)
    chains = torch.empty(1, 0, 3, dtype=torch.int32)
    build_tree(pages, make_batch([row]), chains, tree)
    assert tree.tokens.tolist() == [[42] * 9]
