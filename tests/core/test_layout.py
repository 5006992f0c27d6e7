# SPDX-License-Identifier: Apache-2.0
"""Trees in a flat batch and the walk along them, against plain Python."""

import numpy as np
import pytest
import torch

from tests.core.equivalence import SHAPES, random_hints, random_samples, random_state
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW
from vllm_lookahead.numba_kernels.layout import lay_out, size_trees
from vllm_lookahead.numba_kernels.walk import Walk

MAX_MODEL_LEN = 60  # within reach of some windows


def laid_out(name: str, seed: int):
    """Trees of a random state between requests without any."""
    state = random_state(SHAPES[name], seed)
    hints = random_hints(SHAPES[name], state.n, seed)
    tree, _ = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
    draw = np.random.default_rng(seed)
    num_trees = len(state.batch.root)
    num_requests = num_trees + int(draw.integers(0, 4))
    requests = np.sort(draw.permutation(num_requests)[:num_trees])
    num_tokens = draw.integers(1, 9, num_requests)
    flat = lay_out(tree, state.batch, requests, num_tokens, MAX_MODEL_LEN)
    return state, tree, requests, num_tokens, flat


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHAPES)
def test_where_everything_lies(name, seed):
    state, tree, requests, num_tokens, flat = laid_out(name, seed)
    at, logits, final, fed = 0, [], [], []
    for i, tokens in enumerate(num_tokens.tolist()):
        assert (flat.start[i], flat.logits_start[i]) == (at, len(logits))
        if i not in requests:
            logits.append(at + tokens - 1)
            final += [True] * tokens
            at += tokens
            continue
        b = int(np.nonzero(requests == i)[0][0])
        size = int(tree.num_nodes[b])
        last_row = size - int(state.batch.window_size[b])
        kinds, depths = tree.kinds[b].tolist(), tree.depths[b].tolist()
        for node in range(tree.tokens.shape[1]):
            wanted = node < size and (
                kinds[node] in (ROOT, CANDIDATE)
                or (kinds[node] == WINDOW and node >= last_row)
            )
            assert flat.logits_node[b, node] == (len(logits) if wanted else -1)
            if wanted:
                logits.append(at + node)
            if node < size:
                position = int(state.batch.position[b]) + depths[node]
                position = min(position, MAX_MODEL_LEN - 1)
                fed.append((at + node, int(tree.tokens[b, node]), position))
                final.append(node == 0)
        parents = tree.parents[b, :size].tolist()
        assert flat.is_chain[b] == (parents == list(range(-1, size - 1)))
        drafted = [d for d, k in zip(depths, kinds, strict=True) if k == CANDIDATE]
        assert flat.longest[b] == max(drafted, default=0)
        at += size
    assert flat.start[-1] == at
    assert flat.logits_indices.tolist() == logits
    assert flat.is_final.tolist() == final
    assert list(zip(*flat.fed.tolist(), strict=True)) == fed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SHAPES)
def test_a_walk_level_by_level_is_the_walk(name, seed):
    state, tree, requests, num_tokens, flat = laid_out(name, seed)
    sampled = random_samples(tree, SHAPES[name].vocab, seed)
    verdict = ReferenceOps.verify(tree, sampled, state.n)
    walk = Walk(tree, requests, flat, state.n)
    expected_row = flat.logits_start[1:] - 1
    expected_row[requests] = flat.logits_start[requests]
    node_of = dict(zip(requests.tolist(), range(len(requests)), strict=True))
    assert walk.alive.tolist() == list(range(len(num_tokens)))
    for level in range(state.n):
        drawn = np.full(len(walk.alive), 7)  # of the requests without a tree
        for k, i in enumerate(walk.alive.tolist()):
            if i in node_of:
                b = node_of[i]
                node = verdict.path[b, level]
                drawn[k] = sampled[b, node]
                expected_row[i] = flat.logits_node[b, node]
        assert np.array_equal(walk.logits_row, expected_row)
        walk.advance(drawn)
        goes_on = verdict.num_emitted.numpy() > level + 1
        assert walk.alive.tolist() == requests[goes_on].tolist()
        assert walk.level == level + 1
    without = np.setdiff1d(np.arange(len(num_tokens)), requests)
    assert (walk.tokens[without] == [7] + [EMPTY] * (state.n - 1)).all()
    for name in ("tokens", "path", "num_emitted"):
        assert torch.equal(getattr(walk.verdict(), name), getattr(verdict, name).int())


@pytest.mark.parametrize(
    ("request_row", "plain", "expected"),
    [
        ((0, 10, 3, 5, 3, 25), False, (3, 5, 3, 25)),
        ((0, 10, 3, 5, 3, 3), False, (3, 5, 3, 3)),  # fewer nodes than N
        ((0, 10, 3, 5, 3, 25), True, (3, 5, 3, 1)),
        ((0, 96, 3, 5, 3, 25), False, (3, 3, 3, 4)),  # four positions are left
        ((0, 98, 3, 5, 3, 25), False, (3, 2, 3, 1)),  # one token may be emitted
    ],
)
def test_no_tree_is_larger_than_its_room(request_row, plain, expected):
    sizes = size_trees(np.array([request_row]), 100, plain)
    assert tuple(sizes[:, 0].tolist()) == expected
