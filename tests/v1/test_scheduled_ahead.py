# SPDX-License-Identifier: Apache-2.0
"""A scheduler that is a step ahead sees positions and lengths that are not true yet."""

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, prompts, request, same_as_plain

# T - N is 23: a tree has room for more than the scheduler's placeholders.
WIDE = {"window_size": 3, "ngram_size": 5, "verification_set_size": 4}


@pytest.mark.parametrize("budget", [13, 14])
def test_drafts_cut_by_the_token_budget(engines: Engines, budget: int) -> None:
    """Of three requests of 5 tokens, the last has fewer placeholders left."""
    loop = [20, 21, 22, 23, 24]
    batch = [request((loop * 4)[: 15 + i], max_tokens=40) for i in range(3)]
    sizes = {"max_model_len": 64, "max_num_batched_tokens": 82}
    sizes["max_num_scheduled_tokens"] = budget
    result = same_as_plain(engines, [batch], WIDE, **sizes)
    assert result["metrics"][ACCEPTED] > 60


def test_drafts_cut_by_a_position_that_was_too_high(engines: Engines) -> None:
    """Near `max_model_len`, a step in flight counts as if nothing was rejected."""
    texts = [(p * 8)[:24] for p in prompts(12, seed=7, longest=8)]
    sampled = [
        [request(t, max_tokens=60, temperature=0.4, seed=i)]
        for i, t in enumerate(texts)
    ]
    result = same_as_plain(engines, sampled, WIDE, max_model_len=64)
    assert result["metrics"][ACCEPTED] > 20


@pytest.mark.parametrize("extra", [{"lookahead": 0}, {"lookahead_ngram_size": 2}])
def test_a_cached_prompt_with_one_token_left(engines: Engines, extra: dict) -> None:
    """vLLM would pad such a request to N tokens, be its lookahead off or not."""
    text = prompts(1, seed=9, longest=1)[0] * 65
    batches = [[request(text)], [request(text, extra_args=extra)], [request(text)]]
    same_as_plain(engines, batches, WIDE, block_size=32, enable_prefix_caching=True)
