# SPDX-License-Identifier: Apache-2.0
"""The policy finds the chance from which a node is worth its time."""

import random

import pytest

from vllm_lookahead.core.draft.price import DraftSizePolicy

DEPTH = 7


def draft(rng):
    """Chances of the nodes of a chain to be accepted, given the one before was."""
    return [rng.choice([0.1, 0.3, 0.6, 0.9]) for _ in range(DEPTH)]


def step(chances, least, rng, truth=1.0):
    """Nodes fed, promised and accepted of a chain cut where `least` says."""
    fed, promised, accepted, chance, alive = 0, 0.0, 0, 1.0, True
    for p in chances:
        chance *= p
        if chance < least:
            break
        fed, promised = fed + 1, promised + chance
        alive = alive and rng.random() < p * truth
        accepted += alive
    return fed, promised, accepted


def serve(policy, steps, seconds, rng, truth=1.0, least=None):
    """Steps of one request; returns the speed of the later half.

    Args:
        truth: what a chance must be multiplied by to be right.
        least: instead of the policy's.
    """
    time = tokens = 0.0
    for i in range(steps):
        bound = float(policy.least) if least is None else least
        fed, promised, accepted = step(draft(rng), bound, rng, truth)
        spent = seconds(1 + fed, 1 + accepted) * rng.uniform(0.9, 1.1)
        policy.observe_step(spent, 1, 1 + fed, 1 + accepted, promised)
        if i >= steps // 2:
            time, tokens = time + spent, tokens + 1 + accepted
    return tokens / time


@pytest.mark.parametrize("truth", [1.0, 0.7])
@pytest.mark.parametrize("per_emitted", [0.0, 0.1])
@pytest.mark.parametrize("per_token", [0.005, 0.03, 0.1, 0.3])
def test_nearly_the_best_speed_is_found(per_token, per_emitted, truth):
    def seconds(fed, emitted):
        return 1 + per_token * (fed - 1) + per_emitted * (emitted - 1)

    found = serve(DraftSizePolicy(), 6000, seconds, random.Random(0), truth)
    best = max(
        serve(DraftSizePolicy(), 4000, seconds, random.Random(1), truth, least)
        for least in (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    )
    assert found > 0.95 * best


def test_drafts_that_cost_a_step_each_are_hardly_made():
    def seconds(fed, emitted):
        return fed

    # Plain decoding: 1.
    assert serve(DraftSizePolicy(), 2000, seconds, random.Random(0)) > 0.95


def test_what_gains_nothing_is_not_charged_to_drafts():
    """Sampling an accepted token takes time; drafting it does not."""
    policy = DraftSizePolicy()
    serve(policy, 2000, lambda fed, emitted: 1 + 0.3 * emitted, random.Random(0))
    assert policy.least < 0.03


def test_a_pause_teaches_nothing():
    policy, rng = DraftSizePolicy(), random.Random(0)
    serve(policy, 200, lambda fed, emitted: 1.0, rng)
    before = float(policy.least)
    policy.observe_step(1000.0, 1, 8, 1, 2.0)
    serve(policy, 15, lambda fed, emitted: 1.0, rng)
    assert policy.least == pytest.approx(before, abs=0.02)


def test_drafts_that_did_not_pay_are_tried_again():
    """The load was high once."""
    policy, rng = DraftSizePolicy(), random.Random(0)
    serve(policy, 500, lambda fed, emitted: fed, rng)
    assert policy.least > 0.3
    serve(policy, 4000, lambda fed, emitted: 1 + 0.01 * fed, rng)
    assert policy.least < 0.1


@pytest.mark.parametrize("before", [1, 64])
@pytest.mark.parametrize("now", [1, 32])
def test_a_change_of_load_is_followed_at_once(before, now):
    """A step takes 10, a token 0.3, whatever the batch."""
    policy, rng = DraftSizePolicy(), random.Random(0)

    def steps(num_requests, count):
        for _ in range(count):
            done = [
                step(draft(rng), float(policy.least), rng) for _ in range(num_requests)
            ]
            fed, promised, accepted = (
                sum(column) for column in zip(*done, strict=True)
            )
            tokens, emitted = num_requests + fed, num_requests + accepted
            spent = (10 + 0.3 * tokens) * rng.uniform(0.95, 1.05)
            policy.observe_step(spent, num_requests, tokens, emitted, promised)

    steps(before, 600)
    steps(now, 160)
    found = float(policy.least)
    alone = DraftSizePolicy()
    policy = alone
    steps(now, 600)
    assert found == pytest.approx(float(alone.least), rel=0.4)


def test_many_requests_whose_drafts_did_not_pay_try_again():
    policy, rng = DraftSizePolicy(), random.Random(0)
    for _ in range(400):
        fed, promised, accepted = step(draft(rng), float(policy.least), rng)
        policy.observe_step(1 + fed, 32, 32 * (1 + fed), 32 + accepted, promised)
    assert policy.least > 0.3
    for _ in range(1500):
        done = [step(draft(rng), float(policy.least), rng) for _ in range(32)]
        fed, promised, accepted = (sum(column) for column in zip(*done, strict=True))
        policy.observe_step(1 + 0.0001 * fed, 32, 32 + fed, 32 + accepted, promised)
    assert policy.least < 0.1


def test_promises_that_are_not_kept_count_less():
    def seconds(fed, emitted):
        return 1 + 0.05 * fed

    kept, broken = DraftSizePolicy(), DraftSizePolicy()
    serve(kept, 3000, seconds, random.Random(0), truth=1.0)
    serve(broken, 3000, seconds, random.Random(0), truth=0.5)
    assert broken.least > 1.3 * kept.least


def test_a_chance_is_a_probability():
    policy = DraftSizePolicy()
    assert 0 < policy.least < 0.1
    for _ in range(200):  # nothing is ever accepted, and time is all drafts
        policy.observe_step(10.0, 1, 10, 1, 5.0)
        policy.observe_step(1.0, 1, 1, 1, 0.0)
    assert 0.3 < policy.least <= 1
