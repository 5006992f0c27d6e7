# SPDX-License-Identifier: Apache-2.0
"""The forest finds how many nodes are worth their time, whatever a step costs."""

import random
from collections.abc import Callable
from itertools import accumulate
from operator import mul

import pytest
import torch

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, DraftTree, Node
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v1.forest import Forest
from vllm_lookahead.engine.v1.step_time import StepTime, table_of, time_steps

DEPTH = 7
MOST = 512


NODES = [Node(7, EMPTY, 0, ROOT)]
NODES += [Node(7, depth, depth + 1, CANDIDATE) for depth in range(DEPTH)]


def chains(rng: random.Random, num_requests: int) -> list[list[float]]:
    """Chances of each node of a chain to be accepted, given the one before was."""
    return [
        [rng.choice([0.1, 0.3, 0.6, 0.9]) for _ in range(DEPTH)]
        for _ in range(num_requests)
    ]


def accept(
    given: list[list[float]], num_nodes: list[int], rng: random.Random, truth: float
) -> Verdict:
    """Which of the nodes fed hold; `truth` times a chance is right."""
    path, num_emitted = [], []
    for row, size in zip(given, num_nodes, strict=True):
        held = [rng.random() < truth * chance for chance in row][: size - 1]
        count = held.index(False) if False in held else len(held)
        padding = [EMPTY] * (DEPTH - count)
        path.append([*range(1 + count), *padding])
        num_emitted.append(1 + count)
    paths = torch.tensor(path, dtype=torch.int32)
    return Verdict(paths, paths, torch.tensor(num_emitted, dtype=torch.int32))


def serve(
    forest: Forest,
    steps: int,
    seconds: Callable[[int, int], float],
    rng: random.Random,
    truth: float = 1.0,
    num_requests: int = 1,
    drafts: int | None = None,
) -> tuple[float, float]:
    """Tokens per second and drafts per request and step, of the later half.

    Args:
        seconds: by tokens fed and emitted.
        drafts: so many of each chain instead of what the forest says.
    """
    time = tokens = fed = 0.0
    for i in range(steps):
        given = chains(rng, num_requests)
        tree = DraftTree.of([NODES] * num_requests, 1 + DEPTH)
        chances = torch.tensor([[0.0, *accumulate(row, mul)] for row in given])
        if drafts is None:
            forest.cut(tree, chances, num_requests, 0)
        else:
            chances[:, 1 + drafts :] = 0
            tree.num_nodes[:] = 1 + drafts
        verdict = accept(given, tree.num_nodes.tolist(), rng, truth)
        emitted, num_tokens = int(verdict.num_emitted.sum()), int(tree.num_nodes.sum())
        spent = seconds(num_tokens, emitted) * rng.uniform(0.9, 1.1)
        forest.observe_step(spent, num_tokens, chances, verdict)
        if i >= steps // 2:
            time, tokens = time + spent, tokens + emitted
            fed += (num_tokens - num_requests) / num_requests
    return tokens / time, fed / (steps - steps // 2)


def plain(per_token: float, per_emitted: float = 0.0) -> Callable[[int, int], float]:
    return lambda fed, out: 1 + per_token * (fed - 1) + per_emitted * (out - 1)


def stairs(fed: int, emitted: int) -> float:
    """Up to four tokens cost what one does; from there on, each as much again."""
    return 1.0 if fed <= 4 else 2.0 + 0.3 * (fed - 5)


@pytest.mark.parametrize("truth", [1.0, 0.7])
@pytest.mark.parametrize(
    "seconds",
    [plain(0.005), plain(0.1), plain(0.3), plain(0.03, 0.3), stairs],
)
@pytest.mark.parametrize("timed", [False, True])
def test_no_fixed_number_of_drafts_is_faster(seconds, truth, timed):
    sizes = [(n, 0.7 * seconds(n, 1)) for n in range(1, 9)]
    forest = Forest(MOST)
    forest.step_time = StepTime(table_of(sizes if timed else [], MOST))
    if seconds is stairs and not timed:
        pytest.skip("stairs are not learned where steps were not timed")
    found, _ = serve(forest, 500, seconds, random.Random(0), truth)
    best = max(
        serve(Forest(MOST), 500, seconds, random.Random(1), truth, drafts=count)[0]
        for count in range(1 + DEPTH)
    )
    assert found > 0.96 * best


def test_drafts_that_cost_a_step_each_are_hardly_made():
    _, fed = serve(Forest(MOST), 1000, lambda fed, out: fed, random.Random(0))
    assert fed < 0.4


def test_a_pause_teaches_nothing():
    forest, rng = Forest(MOST), random.Random(0)
    serve(forest, 32, plain(0.1), rng)
    before = forest.step_time.learned.clone()
    serve(forest, 8, plain(0.1), rng)
    serve(forest, 1, lambda fed, out: 1000.0, rng)
    serve(forest, 7, plain(0.1), rng)
    torch.testing.assert_close(forest.step_time.learned, before, rtol=0.3, atol=0.1)


def test_drafts_that_did_not_pay_are_tried_again():
    """The load was high once, and nothing was accepted."""
    forest, rng = Forest(MOST), random.Random(0)
    _, fed = serve(forest, 500, lambda fed, out: fed, rng, truth=0.0)
    assert fed < 0.3
    _, fed = serve(forest, 2000, plain(0.01), rng)
    assert fed > 0.5 * DEPTH


@pytest.mark.parametrize("before", [1, 32])
@pytest.mark.parametrize("now", [1, 16])
def test_a_change_of_load_is_followed_at_once(before, now):
    """A step takes 10, a token 0.3, whatever the batch."""
    changed, alone = Forest(MOST), Forest(MOST)

    def seconds(fed: int, emitted: int) -> float:
        return 10 + 0.3 * fed

    serve(changed, 200, seconds, random.Random(0), num_requests=before)
    serve(alone, 200, seconds, random.Random(0), num_requests=now)
    _, found = serve(changed, 100, seconds, random.Random(1), num_requests=now)
    _, expected = serve(alone, 100, seconds, random.Random(1), num_requests=now)
    assert found == pytest.approx(expected, rel=0.3)


def test_the_more_requests_share_a_step_the_fewer_drafts_has_each():
    def seconds(fed: int, emitted: int) -> float:
        return max(1.0, fed / 32)

    fed = [
        serve(Forest(MOST), 300, seconds, random.Random(0), num_requests=count)[1]
        for count in (1, 8, 32)
    ]
    assert fed[0] > 1.2 * fed[1] > 2 * fed[2]


def test_promises_that_are_not_kept_count_less():
    _, kept = serve(Forest(MOST), 1000, plain(0.1), random.Random(0), truth=1.0)
    _, broken = serve(Forest(MOST), 1000, plain(0.1), random.Random(0), truth=0.4)
    assert broken < 0.8 * kept


def test_least_chance_follows_what_was_cut():
    forest, rng = Forest(MOST), random.Random(0)
    serve(forest, 300, lambda fed, out: fed, rng)
    dear = forest.least
    serve(forest, 600, plain(0.0), rng)
    assert forest.least < 0.3 * dear


class TestTable:
    def test_times_the_best_of_a_few_turns_by_size(self):
        fed: list[int] = []
        timed = time_steps(fed.append, 20)
        assert [size for size, _ in timed] == [1, 2, 4, 8, 9, 16]
        assert fed == sorted(fed)
        assert all(seconds > 0 for _, seconds in timed)

    def test_is_monotone_and_goes_on(self):
        table = table_of([(1, 2.0), (4, 1.9), (8, 3.0)], 12)
        assert table[1:5].tolist() == [2.0] * 4
        assert table[6] == pytest.approx(2.5)
        assert table[12] == pytest.approx(3.0 + 4 / 7)

    def test_is_a_guess_without_a_measurement(self):
        table = table_of([], 3)
        assert table[1:].tolist() == pytest.approx([1.0, 1.03, 1.06])
