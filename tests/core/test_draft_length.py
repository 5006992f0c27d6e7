# SPDX-License-Identifier: Apache-2.0
"""The policy finds the draft length that is worth its time."""

import random
from itertools import product

import pytest
import torch

from vllm_lookahead.core.draft_length import DraftLengthPolicy
from vllm_lookahead.core.pool import BIGRAM
from vllm_lookahead.params import LookaheadParams

PARAMS = LookaheadParams(0, 8, 1)


RATES = {1: 0.2, 4: 0.6, BIGRAM: 0.15}  # by origin, met equally often


def serve(policy, steps, seconds, rng, rates=RATES):
    """Steps of one request; returns time and tokens of the later half."""
    time = tokens = 0.0
    for step in range(steps):
        origin, rate = rng.choice(list(rates.items()))
        length = int(policy.chain_length[origin, 0])
        accepted = 0
        while accepted < length and rng.random() < rate:
            accepted += 1
        policy.trials[origin, :length] += 1
        policy.hits[origin, :accepted] += 1
        spent = seconds(1 + length, 1 + accepted) * rng.uniform(0.9, 1.1)
        policy.observe_step(spent, 1 + length, 1 + accepted)
        if step >= steps // 2:
            time, tokens = time + spent, tokens + 1 + accepted
    return time, tokens


@pytest.mark.parametrize("per_emitted", [0.0, 0.1])
@pytest.mark.parametrize("per_token", [0.005, 0.03, 0.1, 0.3])
def test_nearly_the_best_speed_is_found(per_token, per_emitted):
    def seconds(fed, emitted):
        return 1 + per_token * (fed - 1) + per_emitted * (emitted - 1)

    def speed(lengths):
        emitted = [
            sum(rate**k for k in range(length + 1))
            for rate, length in zip(RATES.values(), lengths, strict=True)
        ]
        spent = sum(seconds(1 + n, e) for n, e in zip(lengths, emitted, strict=True))
        return sum(emitted) / spent

    policy, rng = DraftLengthPolicy(PARAMS), random.Random(0)
    time, tokens = serve(policy, 6000, seconds, rng)
    assert tokens / time > 0.96 * max(map(speed, product(range(8), repeat=3)))


def test_drafts_that_cost_a_step_each_are_hardly_made():
    policy, rng = DraftLengthPolicy(PARAMS), random.Random(0)
    time, tokens = serve(policy, 2000, lambda fed, emitted: fed, rng)
    assert tokens / time > 0.95  # plain decoding: 1


def test_what_gains_nothing_is_not_charged_to_drafts():
    """Sampling an accepted token takes time; drafting it does not."""
    policy, rng = DraftLengthPolicy(PARAMS), random.Random(0)
    serve(policy, 2000, lambda fed, emitted: 1 + 0.3 * emitted, rng)
    assert policy.threshold < 0.02


def test_a_pause_teaches_nothing():
    policy, rng = DraftLengthPolicy(PARAMS), random.Random(0)
    serve(policy, 200, lambda fed, emitted: 1.0, rng)
    before = policy.threshold
    policy.observe_step(1000.0, 8, 1)
    serve(policy, 15, lambda fed, emitted: 1.0, rng)
    assert policy.threshold == pytest.approx(before, abs=0.02)


def test_bad_luck_is_forgotten():
    """An origin that was cut off is tried again."""
    policy, rng = DraftLengthPolicy(PARAMS), random.Random(0)

    def seconds(fed, emitted):
        return 1 + 0.1 * fed

    serve(policy, 500, seconds, rng, {4: 0.6, BIGRAM: 0.0})
    assert policy.chain_length[BIGRAM, 0] == 0
    serve(policy, 4000, seconds, rng, {4: 0.6, BIGRAM: 0.9})
    assert policy.chain_length[BIGRAM, 0] > 2


def test_tables_are_what_propose_and_observe_take():
    policy = DraftLengthPolicy(LookaheadParams(0, 5, 3))
    assert policy.chain_length.shape == (BIGRAM + 1, 3)
    assert policy.chain_length.dtype == torch.int32
    assert policy.trials.shape == policy.hits.shape == (3 * (BIGRAM + 1), 4)
    assert (policy.chain_length == 4).all()
