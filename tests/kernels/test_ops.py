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
    assert_same_trees,
    random_hints,
    random_state,
    run_steps,
)
from tests.kernels.build import REFERENCE, AnySizeTritonOps, poisoned
from vllm_lookahead.core.draft.noise import gpu_noise
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
    assert_same_ops(AnySizeTritonOps(), random_state(shape, 3), shape, 3, gpu_noise)


@pytest.mark.parametrize("name", ["small", "N = 2"])
def test_steps_one_after_another(name):
    shape = SHAPES[name]
    state = random_state(shape, 100)
    own = replace(state, pages=clone_pages(state.pages))
    params = LookaheadParams(shape.w, shape.n, shape.g)
    ops = TritonOps(params, shape.batch + 1, state.pages.tokens.device)
    run_steps(REFERENCE, state, shape, 0, gpu_noise)
    run_steps(ops, own, shape, 0, gpu_noise)
    assert_same_pages(state.pages, own.pages)


def test_results_are_views_of_one_set_of_buffers():
    """What a CUDA graph has captured is what the next step writes."""
    shape = SHAPES["small"]
    state = random_state(shape, 0)
    device = state.pages.tokens.device
    ops = TritonOps(LookaheadParams(shape.w, shape.n, shape.g), 8, device)
    hints = random_hints(shape, state.n, 0, gpu_noise)
    first, chances = ops.draft(state.pages, state.batch, hints, state.g)
    again, own = ops.draft(state.pages, state.batch, hints, state.g)
    assert first.tokens.data_ptr() == again.tokens.data_ptr()
    assert chances.data_ptr() == own.data_ptr()
    logits = torch.randn(5, 20)
    for one, other in zip(
        ops.likeliest_tokens(logits), ops.likeliest_tokens(logits[:2]), strict=True
    ):
        assert one.data_ptr() == other.data_ptr()
    with pytest.raises(ValueError, match="max_emitted=7"):
        ops.verify(first, first.tokens, 7)
    with pytest.raises(ValueError, match="max_candidates=7"):
        ops.draft(state.pages, state.batch, hints, 7)
    with pytest.raises(ValueError, match="9999 rows of logits"):
        ops.likeliest_tokens(torch.zeros(9999, 2))


def test_warming_up_changes_nothing():
    shape = SHAPES["small"]
    state = random_state(shape, 0)
    before = clone_pages(state.pages)
    cache = torch.randn(len(before.tokens), shape.block_size, 2, 4)
    copy = cache.clone()
    device = state.pages.tokens.device
    ops = TritonOps(LookaheadParams(shape.w, shape.n, shape.g), 2, device)
    ops.warm_up(state.pages, poisoned(4, 9), [cache])
    hints = random_hints(shape, state.n, 0, gpu_noise)
    ops.warm_up(state.pages, poisoned(4, 9), [cache], hints, torch.float32)
    assert_same_pages(state.pages, before)
    assert torch.equal(cache, copy)


def test_tables_are_as_wide_as_was_said():
    """A server allocates nothing in a step; a test need not say how wide."""
    shape = SHAPES["small"]
    state = random_state(shape, 0)
    pages, device = state.pages, state.pages.tokens.device
    wide = torch.nn.functional.pad(state.batch.block_table, (0, 100)).contiguous()
    batch = replace(state.batch, block_table=wide)
    hints = random_hints(shape, state.n, 0, gpu_noise)
    expected, _ = REFERENCE.draft(pages, batch, hints, state.g)
    params = LookaheadParams(shape.w, shape.n, shape.g)
    for most in (None, wide.shape[1] * 16):
        ops = TritonOps(params, 3, device, max_tokens=most)
        for _ in range(2):
            tree, _ = ops.draft(pages, batch, hints, state.g)
            assert_same_trees(expected, tree)
    ops = TritonOps(params, 3, device, max_tokens=16)
    with pytest.raises(ValueError, match="too small for"):
        ops.draft(pages, batch, hints, state.g)
    ops.warm_up(pages, wide, [])
    assert_same_trees(expected, ops.draft(pages, batch, hints, state.g)[0])


def test_rows_of_logits_in_parts():
    ops = TritonOps(LookaheadParams(0, 2, 0), 1, torch.get_default_device(), max_rows=7)
    logits = torch.randn(7, 30)
    parts = [
        tuple(x.clone() for x in ops.likeliest_tokens(logits[first:end], first))
        for first, end in ((0, 3), (3, 3), (3, 7))
    ]
    for whole, *own in zip(ops.kept_likeliest(7), *parts, strict=True):
        assert torch.equal(whole, torch.cat(own))
    for whole, again in zip(
        ops.kept_likeliest(7), ops.likeliest_tokens(logits), strict=True
    ):
        assert torch.equal(whole, again)
    with pytest.raises(ValueError, match="8 rows of logits, but buffers for 7"):
        ops.likeliest_tokens(logits[:2], 6)
