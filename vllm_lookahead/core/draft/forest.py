# SPDX-License-Identifier: Apache-2.0
"""Which of the nodes drafted are fed: the best of all of a step's trees together.

A child is never likelier than its parent, and candidates stand in falling order of
their chance. So the best nodes of a forest are trees again, a prefix of each. There
are as many as make tokens per second most, as in vLLM's `adaptive_verification`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import ROOT, WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict

# Chances are told apart by half octaves: (0.71, 1], (0.5, 0.71], down to (0, 0.0078].
NUM_BINS = 15
HALF_OCTAVE = 0.5**0.5


@dataclass
class Worth:
    """What a node gains and costs.

    Attributes:
        shares: [NUM_BINS] float64, of the chances in each bin the part that is kept.
        seconds: [1 + nodes] float64, of a step that is fed 0, 1, 2, ... of them.
        per_emitted: seconds that an emitted token takes beside those.
        emitted: tokens of the step without a candidate.
    """

    shares: np.ndarray
    seconds: np.ndarray
    per_emitted: float
    emitted: float


def bin_of(chance: float) -> int:
    """The half octave that a chance lies in."""
    number, edge = 0, HALF_OCTAVE
    while number < NUM_BINS - 1 and chance <= edge:
        number, edge = number + 1, edge * HALF_OCTAVE
    return number


def cut(tree: DraftTree, chances: torch.Tensor, worth: Worth) -> float:
    """Keep the candidates that are worth their time, in place.

    A tree with a window stays whole, and one whose chances are 0.

    Args:
        tree: B trees.
        chances: [B, T] float32 of their candidates, 0 elsewhere; set to 0 where a
            candidate is cut.
        worth: of so many candidates.

    Returns:
        The greatest chance of a candidate that was cut, 0 if none was.
    """
    nodes = [
        (-float(chances[b, node]), b, node)
        for b, count in enumerate(tree.num_nodes.tolist())
        for node in range(1, count)
        if tree.kinds[b, count - 1] != WINDOW and chances[b, node] > 0
    ]
    nodes.sort()
    emitted, kept = worth.emitted, 0
    best = emitted / (worth.seconds[0] + worth.per_emitted * emitted)
    for count, (chance, _, _) in enumerate(nodes, 1):
        emitted -= chance * worth.shares[bin_of(-chance)]
        speed = emitted / (worth.seconds[count] + worth.per_emitted * emitted)
        if speed > best:
            best, kept = speed, count
    for _, b, node in nodes[kept:]:
        tree.tokens[b, node] = tree.parents[b, node] = EMPTY
        tree.depths[b, node], tree.kinds[b, node] = 0, ROOT
        tree.num_nodes[b] -= 1
        chances[b, node] = 0.0
    return -nodes[kept][0] if kept < len(nodes) else 0.0


def count_kept(
    chances: torch.Tensor, verdict: Verdict, promised: np.ndarray, kept: np.ndarray
) -> None:
    """Add up a step's chances, and how many of its candidates were accepted, by bin.

    Args:
        chances: [B, T] float32 of the candidates fed, 0 elsewhere.
        verdict: of their trees.
        promised, kept: [NUM_BINS] float64, in and out.
    """
    for b, row in enumerate(chances.tolist()):
        path = verdict.path[b, : verdict.num_emitted[b]].tolist()
        for node, chance in enumerate(row):
            if chance > 0:
                promised[bin_of(chance)] += chance
                kept[bin_of(chance)] += node in path
