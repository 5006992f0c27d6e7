# SPDX-License-Identifier: Apache-2.0
import random

import pytest
import torch

from tests.core.build import Node, make_tree
from tests.core.equivalence import (
    Shape,
    assert_same_verdicts,
    random_samples,
    random_state,
)
from tests.kernels.build import (
    POISON,
    REFERENCE,
    poison_padding,
    poisoned,
    random_draft,
    random_trees,
)
from vllm_lookahead.core.tree import CANDIDATE, ROOT
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.verify import verify


def empty_verdict(b: int, n: int) -> Verdict:
    return Verdict(poisoned(b, n), poisoned(b, n), poisoned(b))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 2, 0, batch=1),
        Shape(0, 2, 3),
        Shape(5, 4, 5, batch=5, vocab=2),
        Shape(15, 5, 15, vocab=3),
        Shape(20, 8, 20, batch=2, vocab=2),
        Shape(2, 16, 3, vocab=2, same_sizes=True),
    ],
)
def test_same_as_the_reference(shape, dtype):
    state = random_state(shape, seed=1)
    tree = random_draft(state, shape, 1)
    for seed in range(4):
        sampled = random_samples(tree, shape.vocab, seed).to(dtype)
        expected = REFERENCE.verify(tree, sampled, shape.n)
        verdict = empty_verdict(shape.batch, shape.n)
        verify(poison_padding(tree), sampled, verdict)
        assert_same_verdicts(verdict, expected)


def test_a_chain_accepted_to_its_end():
    """N tokens, the last of them the bonus token after the last candidate."""
    chain = [Node(7, -1, 0, ROOT)]
    chain += [Node(7 + i, i - 1, i, CANDIDATE) for i in range(1, 5)]
    verdict = empty_verdict(1, 5)
    sampled = torch.tensor([[8, 9, 10, 11, 12]])
    verify(make_tree([chain]), sampled, verdict)
    assert verdict.tokens.tolist() == [[8, 9, 10, 11, 12]]
    assert verdict.path.tolist() == [[0, 1, 2, 3, 4]]
    assert verdict.num_emitted.tolist() == [5]


def test_only_candidates_are_walked_and_only_their_samples_read():
    rng = random.Random(0)
    tree = random_trees([40, 1, 128, 0], 128, 6, seed=5)
    read = (tree.kinds == CANDIDATE) & (torch.arange(128) < tree.num_nodes[:, None])
    read[:, 0] = True
    sampled = torch.full((4, 128), POISON, dtype=torch.int64)
    for b, i in read.nonzero().tolist():
        children = (tree.parents[b] == i) & (torch.arange(128) < tree.num_nodes[b])
        tokens = tree.tokens[b][children].tolist()
        sampled[b, i] = rng.choice(tokens) if tokens else 5
    verdict = empty_verdict(4, 7)
    verify(tree, sampled, verdict)
    for b, count in enumerate(verdict.num_emitted.tolist()):
        path = verdict.path[b, :count].tolist()
        assert read[b][path].all() or not tree.num_nodes[b]
        assert (verdict.tokens[b, :count] != POISON).all()
        assert (verdict.path[b, count:] == -1).all()
        assert (verdict.tokens[b, count:] == -1).all()
    assert verdict.num_emitted[1] == 1
    assert verdict.num_emitted[3] == 0
