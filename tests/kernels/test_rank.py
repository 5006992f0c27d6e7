# SPDX-License-Identifier: Apache-2.0
"""The likeliest nodes of a batch, against a loop over all of them."""

import random

import pytest
import torch

from vllm_lookahead.triton_kernels.rank import rank_nodes

SLOTS = 40


def place(
    chances: torch.Tensor, index: list[int], scheduled: list[int], trees: int, best: int
) -> tuple[list[int], ...]:
    """What the kernels write: nodes fed and verified, and three sums."""
    b = len(index)
    start = torch.full((SLOTS + 1,), -7, dtype=torch.int32)
    counts = torch.full((3, b), -7, dtype=torch.int32)
    counts[0, trees:] = 1
    cu = torch.full((2, b + 1), -7, dtype=torch.int32)
    start[0] = 0
    cu[:, 0] = 0
    rows = torch.tensor(scheduled, dtype=torch.int32)
    where = torch.tensor(index)
    rank_nodes(chances, where, rows, trees, best, start, counts, cu[0], cu[1])
    assert (counts[2] == -7).all()
    return tuple(x.tolist() for x in (counts[0], counts[1], start, cu[0], cu[1]))


def sums(values: list[int]) -> list[int]:
    return [sum(values[:i]) for i in range(len(values) + 1)]


@pytest.mark.parametrize("t", [2, 9, 64])
@pytest.mark.parametrize("levels", [1, 4, 10**6])
def test_the_likeliest_of_all(t: int, levels: int) -> None:
    """Ties included: of equals those nearer the front, then of earlier requests."""
    draw = random.Random(t + levels)
    torch.manual_seed(t + levels)
    for _ in range(2):
        rising = (torch.rand(SLOTS, t) * levels).round() / levels
        chances = rising.sort(1, descending=True).values.contiguous()
        chances[:, 0] = 1.0
        trees, others = draw.randint(1, 33), draw.randint(0, 3)
        index = draw.sample(range(SLOTS), trees + others)
        scheduled = [draw.randint(2, t) for _ in range(trees)]
        scheduled += [draw.randint(1, 50) for _ in range(others)]
        nodes = sorted(
            (-chances[index[b], i].item(), i, b)
            for b in range(trees)
            for i in range(1, scheduled[b])
        )
        for best in {0, 1, len(nodes) // 2, len(nodes)}:
            fed = [1] * len(index)
            for _, node, b in nodes[:best]:
                fed[b] += 1
                assert fed[b] == node + 1  # the first ones of its tree: a tree
            got = place(chances, index, scheduled, trees, best)
            tokens = [*fed[:trees], *scheduled[trees:]]
            padding = [sum(tokens)] * (SLOTS - len(tokens))
            expected = fed, fed, sums(tokens) + padding, sums(fed), sums(fed)
            assert got == expected


def test_refusals() -> None:
    chances = torch.zeros(SLOTS, 4)
    with pytest.raises(ValueError, match=r"^3 trees of 2 requests"):
        place(chances, [0, 1], [2, 2], 3, 1)
    with pytest.raises(ValueError, match="^chances is"):
        place(chances.double(), [0, 1], [2, 2], 2, 1)
