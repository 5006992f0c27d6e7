# SPDX-License-Identifier: Apache-2.0
"""Whole generations against a model that is right only if all it sees is right."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.core.fake_model import WRONG, FakeEngine, FakeModel, FakeRequest
from tests.core.fake_model import run_to_length as run
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.params import LookaheadParams

# Loops soon, so that whole n-grams are accepted.
MARKOV = FakeModel(vocab=7, order=2)
# Never loops, and feels every token it sees; a guess is right half of the time.
COIN = FakeModel(vocab=2, order=0)

SIZES = [
    (0, 2, 1),
    (0, 3, 0),
    (0, 5, 8),
    (1, 2, 0),
    (1, 2, 1),
    (1, 3, 1),
    (2, 2, 3),
    (3, 4, 3),
    (5, 5, 5),
    (15, 5, 15),
    (20, 8, 20),
]
LONG = 61
EMITTED = 40


def prompt(length: int, model: FakeModel, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(model.vocab) for _ in range(length)]


def start_all(
    engine: FakeEngine, prompts: Sequence[list[int]], sizes: Sequence[tuple]
) -> list[FakeRequest]:
    requests = [FakeRequest(p, *s) for p, s in zip(prompts, sizes, strict=True)]
    for request in requests:
        engine.start(request, room(request))
    return requests


def room(request: FakeRequest) -> int:
    size = LookaheadParams(request.w, request.n, request.g).max_tree_size
    return max(LONG, len(request.prompt)) + EMITTED + request.n + size


def make_engine(
    ops: LookaheadOps,
    model: FakeModel,
    sizes: tuple[int, int, int],
    block_size: int,
    longest: int = LONG,
    with_bigrams: bool = False,
) -> FakeEngine:
    capacity = longest + EMITTED + sizes[1] + LookaheadParams(*sizes).max_tree_size
    num_blocks = 6 * (capacity // block_size + 1)
    seed = sum(sizes)
    return FakeEngine(ops, model, sizes, block_size, num_blocks, seed, with_bigrams)


def assert_lossless(model: FakeModel, requests: Sequence[FakeRequest]) -> None:
    for request in requests:
        count = len(request.text) - len(request.prompt)
        assert request.text == model.continue_text(request.prompt, count)
        # The first token of an output is the prefill's.
        assert count == 1 + sum(request.emitted)
        assert all(1 <= length <= request.n for length in request.emitted)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("model", [MARKOV, COIN], ids=["markov", "coin"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_output_is_sequential_decoding(ops, sizes, model, block_size):
    _, n, g = sizes
    engine = make_engine(ops, model, sizes, block_size)
    lengths = [1, max(1, n - 2), n - 1, LONG]
    requests = start_all(
        engine, [prompt(length, model) for length in lengths], [sizes] * 4
    )

    run(engine, requests, LONG + EMITTED)

    assert_lossless(model, requests)
    steps = [length for request in requests for length in request.emitted]
    if g == 0:
        assert set(steps) == {1}
    else:
        assert sum(steps) / len(steps) > 1.2
    if g and model is MARKOV:
        assert max(steps) == n, "a full match emits its N-1 tokens and the bonus"


@pytest.mark.parametrize("model", [MARKOV, COIN], ids=["markov", "coin"])
@pytest.mark.parametrize(
    "sizes", [(0, 2, 1), (0, 8, 8), (5, 4, 5), (15, 5, 15)], ids=str
)
def test_bigrams_of_the_model(ops, sizes, model):
    """What was never seen is drafted as well."""
    engine = make_engine(ops, model, sizes, 32, with_bigrams=True)
    requests = start_all(
        engine, [prompt(k, model) for k in (1, 2, 3, LONG)], [sizes] * 4
    )
    run(engine, requests, LONG + EMITTED)
    assert_lossless(model, requests)
    steps = [length for request in requests for length in request.emitted]
    assert sum(steps) / len(steps) > 1.2


def test_bigrams_are_drafted_as_far_as_the_tree_goes(ops):
    """Of a model that reads one token they are all there is to know."""
    model, sizes = FakeModel(vocab=50, order=1), (0, 8, 8)
    engine = make_engine(ops, model, sizes, 16, with_bigrams=True)
    requests = start_all(engine, [prompt(k, model) for k in (1, 20)], [sizes] * 2)
    run(engine, requests, LONG + EMITTED)
    assert_lossless(model, requests)
    assert {length for request in requests for length in request.emitted} == {8}


class Forgetful:
    """Other ops, without the answers."""

    def __init__(self, ops: LookaheadOps) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def keep_answers(self, *args: Any) -> None: ...


def test_answers_are_drafted(ops):
    """Of rejected nodes, too: steps are fewer than by the text alone."""
    model, sizes = FakeModel(vocab=7, order=2), (0, 5, 8)
    steps = []
    for of in (ops, Forgetful(ops)):
        engine = make_engine(of, model, sizes, 16)
        requests = start_all(engine, [prompt(k, model) for k in (1, 9)], [sizes] * 2)
        run(engine, requests, 70)
        assert_lossless(model, requests)
        steps.append(sum(len(request.emitted) for request in requests))
    assert steps[0] < steps[1]


@pytest.mark.parametrize("sizes", [(0, 8, 8), (20, 8, 20)], ids=str)
def test_prompts_longer_than_the_tree_in_blocks_of_128(ops, sizes):
    """Before, at and behind the borders of blocks."""
    lengths = [127, 128, 129, 383, 600]
    assert lengths[-1] > 2 * LookaheadParams(*sizes).max_tree_size
    engine = make_engine(ops, COIN, sizes, 128, longest=lengths[-1])
    requests = start_all(engine, [prompt(k, COIN) for k in lengths], [sizes] * 5)
    for request in requests:
        run(engine, [request], len(request.prompt) + EMITTED)
    run(engine, requests, 128 + EMITTED + 20)
    assert_lossless(COIN, requests)
    steps = [length for request in requests for length in request.emitted]
    assert sum(steps) / len(steps) > 1.2


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_batch_of_one_at_block_borders(ops, length):
    engine = make_engine(ops, COIN, (3, 4, 3), 16)
    requests = start_all(engine, [prompt(length, COIN)], [(3, 4, 3)])
    run(engine, requests, length + EMITTED)
    assert_lossless(COIN, requests)
    assert len(requests[0].emitted) < EMITTED


@pytest.mark.parametrize("model", [MARKOV, COIN], ids=["markov", "coin"])
def test_each_request_has_its_own_sizes(ops, model):
    sizes = [(5, 5, 6), (0, 5, 6), (2, 3, 1), (1, 2, 0), (4, 2, 6), (5, 5, 0)]
    engine = make_engine(ops, model, (5, 5, 6), 16)
    prompts = [prompt(20, model, seed) for seed in range(len(sizes))]
    requests = start_all(engine, prompts, sizes)

    run(engine, requests, LONG + EMITTED)

    assert_lossless(model, requests)
    for request in requests:
        assert (max(request.emitted) > 1) == (request.g > 0)


def test_trees_cut_to_any_size(ops):
    engine = make_engine(ops, COIN, (5, 4, 5), 16)
    prompts = [prompt(length, COIN) for length in (1, 2, 30)]
    requests = start_all(engine, prompts, [(5, 4, 5)] * 3)
    run(engine, requests, LONG + EMITTED, max_tree=32)
    assert_lossless(COIN, requests)
    assert any(length > 1 for request in requests for length in request.emitted)


def test_a_tree_of_one_node_is_plain_decoding(ops):
    engine = make_engine(ops, MARKOV, (5, 4, 5), 16)
    requests = start_all(engine, [prompt(30, MARKOV)] * 2, [(5, 4, 5)] * 2)
    run(engine, requests, LONG, max_tree=1)
    assert_lossless(MARKOV, requests)
    assert all(set(request.emitted) == {1} for request in requests)


def test_preempted_requests_resume_in_other_blocks(ops):
    engine = make_engine(ops, COIN, (4, 4, 4), 16)
    prompts = [prompt(length, COIN) for length in (3, 16, 40)]
    requests = start_all(engine, prompts, [(4, 4, 4)] * 3)
    for length in (45, 60, 80):
        run(engine, requests, length)
        for request in requests:
            engine.preempt(request)
        for request in reversed(requests):
            engine.start(request, room(request))
    run(engine, requests, LONG + EMITTED)
    assert_lossless(COIN, requests)


def test_requests_that_share_prefix_blocks(ops):
    engine = make_engine(ops, COIN, (4, 4, 4), 16)
    text = prompt(50, COIN)
    first = FakeRequest(text, 4, 4, 4)
    engine.start(first, room(first))
    run(engine, [first], 70)
    # One asks the same again; one goes on from the first one's output.
    again = FakeRequest(text, 4, 4, 4)
    engine.start(again, room(again), first.blocks[:3])
    follow_up = FakeRequest(first.text[:65], 4, 4, 4)
    engine.start(follow_up, room(follow_up), first.blocks[:4])
    run(engine, [first, again, follow_up], LONG + EMITTED)
    assert_lossless(COIN, [first, again, follow_up])


class Sabotaged(ReferenceOps):
    """ReferenceOps with one fault, to show that the fake model notices it."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def draft(self, *args) -> tuple[DraftTree, torch.Tensor]:
        tree, chances = ReferenceOps.draft(*args)
        inner = (tree.parents >= 0) & (tree.depths > 1)
        if self.fault == "depths":
            tree = replace(tree, depths=torch.where(inner, 1, tree.depths))
        if self.fault == "parents":
            tree = replace(tree, parents=torch.where(inner, 0, tree.parents))
        return tree, chances

    def verify(self, tree, sampled, max_emitted):
        if self.fault == "samples":
            sampled = sampled.roll(1, 1)
        return ReferenceOps.verify(tree, sampled, max_emitted)

    def compact(self, caches, *args):
        if self.fault == "one cache":
            caches = caches[:1]
        if self.fault != "no move":
            ReferenceOps.compact(caches, *args)


@pytest.mark.parametrize(
    "fault", ["depths", "parents", "samples", "one cache", "no move"]
)
def test_the_fake_model_notices(fault):
    engine = make_engine(Sabotaged(fault), COIN, (4, 4, 4), 16)
    requests = start_all(engine, [prompt(30, COIN)] * 2, [(4, 4, 4)] * 2)
    run(engine, requests, LONG + EMITTED)
    with pytest.raises(AssertionError):
        assert_lossless(COIN, requests)


def test_the_fake_model_reads_the_caches():
    engine = make_engine(ReferenceOps(), COIN, (4, 4, 4), 16)
    (request,) = start_all(engine, [prompt(30, COIN)], [(4, 4, 4)])
    engine.caches[1][request.blocks[0], 5, 1] += 1
    engine.step([request])
    assert request.text[-1] == WRONG
