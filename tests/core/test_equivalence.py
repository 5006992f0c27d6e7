# SPDX-License-Identifier: Apache-2.0
"""Every implementation of `LookaheadOps` does exactly what ReferenceOps does."""

from dataclasses import replace

import pytest

from tests.core.build import clone_pages
from tests.core.equivalence import (
    SHAPES,
    assert_same_ops,
    assert_same_pages,
    assert_same_trees,
    assert_same_verdicts,
    random_state,
    run_steps,
)
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, WINDOW


@pytest.mark.parametrize("name", SHAPES)
def test_each_op(other_ops, name):
    shape = SHAPES[name]
    emitted = [
        assert_same_ops(other_ops, random_state(shape, seed), shape.vocab, seed)
        for seed in range(6)
    ]
    assert max(emitted) > 1 or shape.g == 0 or name in ("empty pool", "many tokens")


@pytest.mark.parametrize("name", SHAPES)
def test_steps_one_after_another(other_ops, name):
    """The state that an implementation leaves is the one that it needs."""
    shape, seed = SHAPES[name], 100
    state = random_state(shape, seed)
    own = replace(state, pages=clone_pages(state.pages))
    expected = run_steps(ReferenceOps(), state, shape.vocab, seed)
    done = run_steps(other_ops, own, shape.vocab, seed)
    for (tree, verdict), (own_tree, own_verdict) in zip(expected, done, strict=True):
        assert_same_trees(tree, own_tree)
        assert_same_verdicts(verdict, own_verdict)
    assert_same_pages(state.pages, own.pages)


def test_the_states_are_hard():
    """They have candidates and windows, trees cut short, and shared prefixes."""
    full = cut = merged = 0
    for seed in range(20):
        shape = SHAPES["eight ragged requests"]
        state = random_state(shape, seed)
        tree = ReferenceOps().propose(state.pages, state.batch, state.g)
        kinds = [set(row.tolist()) for row in tree.kinds]
        full += sum({CANDIDATE, WINDOW} <= k for k in kinds)
        cut += int((tree.num_nodes == state.batch.max_nodes).sum())
        siblings = [p[p > 0].tolist() for p in tree.parents]
        merged += sum(len(set(s)) < len(s) for s in siblings)
    assert min(full, cut, merged) > 5
