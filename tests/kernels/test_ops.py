# SPDX-License-Identifier: Apache-2.0
"""`TritonOps` against `ReferenceOps`, on a part of what all implementations do."""

from dataclasses import replace

import pytest
import torch

from tests.core.build import clone_pages
from tests.core.equivalence import (
    SHAPES,
    assert_same_ops,
    assert_same_pages,
    random_state,
    run_steps,
)
from tests.kernels.build import REFERENCE, AnySizeTritonOps, poisoned
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.ops import TritonOps

CHOSEN = (
    "eight ragged requests",
    "tree of one node",
    "no window",
    "N = 16",
    "tree of 120",
    "roots at block borders",
    "holes in the history",
    "one token only",
    "many tokens",
    "blocks of 32",
)


@pytest.mark.parametrize("name", CHOSEN)
def test_each_op(name):
    shape = SHAPES[name]
    assert_same_ops(AnySizeTritonOps(), random_state(shape, 3), shape.vocab, 3)


@pytest.mark.parametrize("name", ["small", "N = 2"])
def test_steps_one_after_another(name):
    shape = SHAPES[name]
    state = random_state(shape, 100)
    own = replace(state, pages=clone_pages(state.pages))
    params = LookaheadParams(shape.w, shape.n, shape.g)
    ops = TritonOps(params, shape.batch + 1, state.pages.tokens.device)
    run_steps(REFERENCE, state, shape.vocab, 0)
    run_steps(ops, own, shape.vocab, 0)
    assert_same_pages(state.pages, own.pages)


def test_results_are_views_of_one_set_of_buffers():
    """What a CUDA graph has captured is what the next step writes."""
    shape = SHAPES["small"]
    state = random_state(shape, 0)
    device = state.pages.tokens.device
    ops = TritonOps(LookaheadParams(shape.w, shape.n, shape.g), 8, device)
    first = ops.propose(state.pages, state.batch, state.g)
    again = ops.propose(state.pages, state.batch, state.g)
    assert first.tokens.data_ptr() == again.tokens.data_ptr()
    with pytest.raises(ValueError, match="max_emitted=7"):
        ops.verify(first, first.tokens, 7)
    with pytest.raises(ValueError, match="max_candidates=7"):
        ops.propose(state.pages, state.batch, 7)


def test_warming_up_changes_nothing():
    shape = SHAPES["small"]
    state = random_state(shape, 0)
    before = clone_pages(state.pages)
    cache = torch.randn(len(before.tokens), shape.block_size, 2, 4)
    copy = cache.clone()
    device = state.pages.tokens.device
    ops = TritonOps(LookaheadParams(shape.w, shape.n, shape.g), 2, device)
    ops.warm_up(state.pages, poisoned(4, 9), [cache])
    assert_same_pages(state.pages, before)
    assert torch.equal(cache, copy)
