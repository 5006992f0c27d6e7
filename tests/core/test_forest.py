# SPDX-License-Identifier: Apache-2.0
"""The nodes kept of a step's trees are those that make tokens per second most."""

import copy
import math

import numpy as np
import pytest
import torch

from tests.core.equivalence import SHAPES, random_hints, random_state
from vllm_lookahead.core.draft import forest as reference
from vllm_lookahead.core.draft.forest import NUM_BINS, Worth, bin_of
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels import forest as numba

OPS = pytest.mark.parametrize("ops", [reference, numba], ids=["reference", "numba"])


def drafted(name: str, seed: int) -> tuple[DraftTree, torch.Tensor]:
    state, shape = random_state(SHAPES[name], seed), SHAPES[name]
    hints = random_hints(shape, state.n, seed)
    return ReferenceOps.draft(state.pages, state.batch, hints, state.g)


def random_worth(chances: torch.Tensor, num_trees: int, seed: int) -> Worth:
    rng = np.random.default_rng(seed)
    steps = rng.choice([0.0, 0.01, 0.3], chances.numel())
    seconds = np.cumsum(np.concatenate([[1.0], steps]))
    return Worth(rng.uniform(0.2, 1.2, NUM_BINS), seconds, 0.1, float(num_trees))


def speed(chances: list[float], worth: Worth) -> float:
    emitted = worth.emitted + sum(c * worth.shares[bin_of(c)] for c in chances)
    return emitted / (worth.seconds[len(chances)] + worth.per_emitted * emitted)


@pytest.mark.parametrize("name", ["no window", "eight ragged requests", "tree of 280"])
@pytest.mark.parametrize("seed", range(3))
def test_numba_cuts_as_the_reference(name: str, seed: int) -> None:
    tree, chances = drafted(name, seed)
    worth = random_worth(chances, len(tree.num_nodes), seed)
    other, its_chances = copy.deepcopy((tree, chances))
    found = reference.cut(tree, chances, worth)
    assert numba.cut(other, its_chances, worth) == pytest.approx(found)
    assert torch.equal(chances, its_chances)
    for column, expected in zip(vars(other).values(), vars(tree).values(), strict=True):
        assert torch.equal(column, expected)


@OPS
@pytest.mark.parametrize("seed", range(5))
def test_no_other_number_of_the_best_nodes_is_faster(ops, seed: int) -> None:
    tree, chances = drafted("no window", seed)
    before, worth = chances.clone(), random_worth(chances, len(chances), seed)
    greatest_cut = ops.cut(tree, chances, worth)
    best = sorted(before[before > 0].tolist(), reverse=True)
    kept = sorted(chances[chances > 0].tolist(), reverse=True)
    assert kept == best[: len(kept)]
    assert greatest_cut == (best[len(kept)] if len(kept) < len(best) else 0.0)
    fastest = max(speed(best[:count], worth) for count in range(len(best) + 1))
    assert speed(kept, worth) == pytest.approx(fastest)


@OPS
def test_what_is_left_are_trees(ops) -> None:
    tree, chances = drafted("no window", 0)
    whole = tree.nodes()
    ops.cut(tree, chances, random_worth(chances, len(chances), 1))
    assert tree.num_nodes.sum() < sum(map(len, whole))
    for b, nodes in enumerate(tree.nodes()):
        assert nodes == whole[b][: len(nodes)]
        assert not (tree.kinds[b, len(nodes) :] == CANDIDATE).any()
        assert (chances[b, 1 : len(nodes)] > 0).all()


@OPS
def test_a_tree_with_a_window_stays_whole(ops) -> None:
    tree, chances = drafted("tree of 120", 0)
    whole = copy.deepcopy(tree)
    assert (tree.kinds == WINDOW).any(1).all()
    free = Worth(np.ones(NUM_BINS), np.arange(1.0, 2 + chances.numel()), 0.0, 3.0)
    assert ops.cut(tree, chances, free) == 0
    assert torch.equal(tree.num_nodes, whole.num_nodes)


@OPS
def test_accepted_nodes_are_counted_by_their_chance(ops) -> None:
    chances = torch.tensor([[0, 0.9, 0.6, 0.3, 0.0], [0, 0.9, 0.001, 0.0, 0.0]])
    path = torch.tensor([[0, 1, 3], [0, -1, -1]], dtype=torch.int32)
    verdict = Verdict(path, path, torch.tensor([3, 1], dtype=torch.int32))
    promised, kept = np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    ops.count_kept(chances, verdict, promised, kept)
    expected = {0: (1.8, 1), 1: (0.6, 0), 3: (0.3, 1), NUM_BINS - 1: (0.001, 0)}
    for number in range(NUM_BINS):
        sums = promised[number], kept[number]
        assert sums == pytest.approx(expected.get(number, (0, 0)))


def test_bins_are_half_octaves() -> None:
    for chance in np.linspace(0.01, 1, 200):
        number = bin_of(chance)
        assert number == math.ceil(-2 * math.log2(chance) + 1e-9) - 1 or chance == 1
