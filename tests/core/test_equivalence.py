# SPDX-License-Identifier: Apache-2.0
"""Every implementation of `LookaheadOps` does exactly what ReferenceOps does."""

from dataclasses import replace

import pytest
import torch

from tests.core.build import clone_pages
from tests.core.equivalence import (
    SHAPES,
    assert_same_likeliest_tokens,
    assert_same_ops,
    assert_same_pages,
    assert_same_trees,
    assert_same_verdicts,
    random_hints,
    random_state,
    run_steps,
)
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, WINDOW
from vllm_lookahead.numba_kernels.answers import likeliest_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_each_op(other_ops, name):
    shape = SHAPES[name]
    emitted = [
        assert_same_ops(other_ops, random_state(shape, seed), shape, seed)
        for seed in range(6)
    ]
    assert max(emitted) > 1 or shape.g == 0 or name == "many tokens"


@pytest.mark.parametrize("name", SHAPES)
def test_steps_one_after_another(other_ops, name):
    """The state that an implementation leaves is the one that it needs."""
    shape, seed = SHAPES[name], 100
    state = random_state(shape, seed)
    own = replace(state, pages=clone_pages(state.pages))
    expected = run_steps(ReferenceOps(), state, shape, seed)
    done = run_steps(other_ops, own, shape, seed)
    for (tree, verdict), (own_tree, own_verdict) in zip(expected, done, strict=True):
        assert_same_trees(tree, own_tree)
        assert_same_verdicts(verdict, own_verdict)
    assert_same_pages(state.pages, own.pages)


def test_the_states_are_hard():
    """They have candidates and windows, trees cut short, and forks below the root."""
    full = cut = forked = 0
    shape = SHAPES["eight ragged requests"]
    for seed in range(20):
        state = random_state(shape, seed)
        hints = random_hints(shape, state.n, seed)
        tree, _ = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
        kinds = [set(row.tolist()) for row in tree.kinds]
        full += sum({CANDIDATE, WINDOW} <= k for k in kinds)
        cut += int((tree.num_nodes == state.batch.max_nodes).sum())
        siblings = [p[p > 0].tolist() for p in tree.parents]
        forked += sum(len(set(s)) < len(s) for s in siblings)
    assert min(full, cut, forked) > 5


@pytest.mark.parametrize("source", ["tokens", "ring", "answers", "bigrams", "noise"])
def test_every_source_shapes_the_trees(source):
    """Without it they are others."""
    shape, changed = SHAPES["eight ragged requests"], 0
    for seed in range(4):
        state = random_state(shape, seed)
        hints = random_hints(shape, state.n, seed)
        tree, _ = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
        match source:
            case "tokens":
                state.pages.tokens[:] = EMPTY
            case "ring":
                state.pages.ring_count[:] = 0
            case "answers":
                state.pages.answer_count[:] = 0
            case "bigrams":
                hints.bigrams[:] = EMPTY
            case "noise":
                hints.temperature[:] = 0
        less, _ = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
        candidates = [
            torch.where(t.kinds == CANDIDATE, t.tokens, EMPTY) for t in (tree, less)
        ]
        changed += int((candidates[0] != candidates[1]).any(1).sum())
    assert changed >= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 3, 8, 1024, 1025, 2048, 5000])
def test_likeliest_tokens(vocab, dtype):
    assert_same_likeliest_tokens(likeliest_tokens, vocab, dtype)
