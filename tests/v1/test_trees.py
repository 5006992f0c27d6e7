# SPDX-License-Identifier: Apache-2.0
"""What a step's trees are to the runner; that attention reads them is elsewhere."""

import numpy as np
import pytest
import torch

from tests.core.equivalence import Shape, random_hints, random_state
from vllm_lookahead.core.answers import likeliest_tokens
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import WINDOW
from vllm_lookahead.engine.v1.trees import StepTrees
from vllm_lookahead.numba_kernels.layout import lay_out

NUM_TOKENS = np.array([3, 1, 4, 1, 2])
REQUESTS = np.array([0, 2, 3])  # those with a tree
VOCAB = 40


@pytest.fixture(params=[0, 3])
def trees(request: pytest.FixtureRequest) -> StepTrees:
    """Of three requests of five, with a window or without."""
    shape = Shape(request.param, 4, 3, same_sizes=True)
    state = random_state(shape, seed=0)
    hints = random_hints(shape, state.n, seed=0)
    tree, chances = ReferenceOps.draft(state.pages, state.batch, hints, state.g)
    flat = lay_out(tree, state.batch, REQUESTS, NUM_TOKENS, 10_000)
    return StepTrees(["a", "b", "c"], REQUESTS, state.batch, tree, flat, chances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_of_each_node_that_is_verified(
    trees: StepTrees, dtype: torch.dtype
) -> None:
    """Whatever rows of other requests and of a window lie between the trees'."""
    torch.manual_seed(0)
    logits = torch.randn(int(trees.flat.logits_start[-1]), VOCAB).to(dtype)
    answers = trees.answers(logits)
    assert answers.first_row.dtype == torch.int32
    node_of_row = dict(enumerate(trees.flat.logits_indices.tolist()))
    checked = 0
    for b, nodes in enumerate(trees.tree.nodes()):
        for i, node in enumerate(nodes):
            if node.kind == WINDOW:
                continue
            row = int(answers.first_row[b]) + i
            assert node_of_row[row] == int(trees.flat.start[REQUESTS[b]]) + i
            expected, logprobs = likeliest_tokens(logits[row : row + 1])
            assert torch.equal(answers.tokens[row], expected[0])
            torch.testing.assert_close(answers.logprobs[row], logprobs[0])
            checked += 1
    assert checked > 2 * len(REQUESTS)


def test_how_many_requests_and_tokens(trees: StepTrees) -> None:
    sizes = trees.tree.num_nodes.tolist()
    assert trees.num_requests == len(NUM_TOKENS)
    assert trees.num_tokens == sum(sizes) + 1 + 2
    assert not trees.only_decodes
    longest = [
        max((node.depth for node in nodes if node.kind != WINDOW), default=0)
        for nodes in trees.tree.nodes()
    ]
    assert trees.num_draft_tokens() == dict(zip("abc", longest, strict=True))
