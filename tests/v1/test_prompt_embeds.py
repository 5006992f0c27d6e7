# SPDX-License-Identifier: Apache-2.0
"""Prompts of embeddings beside prompts of tokens."""

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, in_batches, prompts, request, same_as_plain
from tests.v1.test_lossless import CHAIN, FULL


@pytest.mark.parametrize("lookahead", [CHAIN, FULL], ids=["chain", "full"])
def test_same_as_plain(engines: Engines, lookahead: dict[str, int]) -> None:
    """More nodes than N are fed, each of which vLLM must take for a token."""
    requests = []
    for i, text in enumerate(prompts(8, seed=71)):
        own = {"temperature": 0.7, "seed": i} if i % 4 > 1 else {}
        one = request(text, max_tokens=40, **own)
        embeds = {"seed": i, "length": len(text)}
        requests += [one, request([], max_tokens=40, **own) | {"embeds": embeds}]
    jobs = in_batches(requests, 4)
    result = same_as_plain(engines, jobs, lookahead, enable_prompt_embeds=True)
    assert result["metrics"][ACCEPTED] > 0
