# SPDX-License-Identifier: Apache-2.0
"""What a step leaves to the next one's drafts."""

import numpy as np
import torch

from tests.core.build import ints
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v1.trees import StepTrees, rejected_nodes

LOGITS = torch.randn(7, 30)


def finished_step() -> StepTrees:
    """Of "a" a chain of three is drafted, one accepted; of "b" two and a window."""
    step = object.__new__(StepTrees)
    step.request_ids = ["a", "b"]

    class Tree:
        tokens = ints([[10, 11, 12, 13], [20, 21, 22, 9]])
        depths = ints([[0, 1, 2, 3], [0, 1, 1, 1]])
        kinds = ints([[ROOT, *[CANDIDATE] * 3], [ROOT, *[CANDIDATE] * 2, WINDOW]])

    class Flat:
        logits_node = np.array([[0, 1, 2, 3], [4, 5, 6, -1]])

    step.tree, step.flat = Tree, Flat  # type: ignore[assignment]
    step.finish(LOGITS, Verdict(ints([]), ints([]), ints([2, 1])))
    return step


def test_rejected_nodes_lie_below_the_new_root() -> None:
    rejected = rejected_nodes(finished_step(), ["a", "b"])
    # "a" is at depth 2 now, where 12 was wrong; 13 is a step further.
    assert rejected.tokens.tolist() == [[EMPTY, EMPTY, 12, 13], [EMPTY, 21, 22, EMPTY]]
    assert rejected.depths[0, 2:].tolist() == [0, 1]
    assert rejected.depths[1, 1:3].tolist() == [0, 0]
    assert torch.equal(rejected.logits[rejected.rows[0, 2:]], LOGITS[2:4])
    assert torch.equal(rejected.logits[rejected.rows[1, 1:3]], LOGITS[5:])
    assert len(rejected.logits) == 4


def test_requests_are_found_by_name() -> None:
    rejected = rejected_nodes(finished_step(), ["b", "new"])
    assert rejected.tokens.tolist() == [[EMPTY, 21, 22, EMPTY], [EMPTY] * 4]
    assert torch.equal(rejected.logits[rejected.rows[0, 1:3]], LOGITS[5:])


def test_before_anything_was_sampled_nothing_is_rejected() -> None:
    step = finished_step()
    step.rejected = None
    for last in (None, step):
        assert rejected_nodes(last, ["a"]).tokens.shape == (1, 0)
