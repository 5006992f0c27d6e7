# SPDX-License-Identifier: Apache-2.0
"""Chains from the model's bigrams."""

import pytest
import torch

from tests.core.build import Row, make_batch, make_pages, write
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS, model_bigrams
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps

# After token t the model says t + 1, then t + 2 and t + 3.
COUNTING = torch.arange(50)[:, None].int() + torch.tensor([1, 2, 3]).int()


@pytest.fixture
def ops():
    return ReferenceOps()


def proposed(ops, history, root, bigrams, **sizes):
    """(token, parent) of each candidate node; W=0, N=4, G=3."""
    g, n = 3, 4
    pages = make_pages(4, 8, 0, n)
    row = Row([2, 0, 3], len(history), root, w=0, n=n, g=sizes.get("g", g))
    row.n = sizes.get("n", n)
    batch = make_batch([row])
    write(ops, pages, row.blocks, history)
    tree = ops.propose(pages, batch, g, bigrams)
    size = int(tree.num_nodes[0])
    columns = tree.tokens, tree.parents
    return list(zip(*(c[0, 1:size].tolist() for c in columns), strict=True))


def test_an_empty_pool_gives_the_successors_of_the_root(ops):
    chains = proposed(ops, [40, 41], 10, COUNTING)
    assert chains == [
        (11, 0),
        (12, 1),
        (13, 2),
        (12, 0),
        (13, 4),
        (14, 5),
        (13, 0),
        (14, 7),
        (15, 8),
    ]


def test_what_the_pool_knows_comes_first_and_goes_on(ops):
    # 5 was followed by 9 and then by the root itself.
    chains = proposed(ops, [40, 5, 9], 5, COUNTING, g=1)
    assert chains == [
        (9, 0),
        (5, 1),
        (6, 2),
    ]


def test_a_token_without_successors_ends_a_chain(ops):
    bigrams = COUNTING.clone()
    bigrams[12] = EMPTY
    chains = proposed(ops, [40, 41], 10, bigrams, g=1)
    assert [token for token, _ in chains] == [11, 12]
    assert proposed(ops, [40, 41], 12, bigrams, g=1) == []
    # beyond the table
    assert [t for t, _ in proposed(ops, [40], 49, COUNTING, g=1)] == [50]
    assert proposed(ops, [40], 60, COUNTING, g=1) == []


def test_a_request_gets_what_it_asks_for(ops):
    assert proposed(ops, [40, 41], 10, COUNTING, g=0) == []
    assert len(proposed(ops, [40, 41], 10, COUNTING, g=2, n=2)) == 2


def test_the_model_is_asked_in_chunks_for_the_first_tokens():
    asked = []

    def likeliest(tokens):
        asked.append(tokens.tolist())
        ids = tokens[:, None] + torch.arange(NUM_SUCCESSORS)
        return -ids / 2, ids

    bigrams, logits = model_bigrams(likeliest, vocab_size=10, limit=5, chunk=2)
    assert asked == [[0, 1], [2, 3], [4]]
    assert bigrams.dtype == torch.int32 and bigrams.shape == (10, NUM_SUCCESSORS)
    assert bigrams[4, :4].tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(logits[:5].exp().sum(1), torch.ones(5))
    torch.testing.assert_close(
        logits[4].diff(), torch.full((NUM_SUCCESSORS - 1,), -0.5)
    )
    assert (bigrams[5:] == EMPTY).all()
