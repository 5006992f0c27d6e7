# SPDX-License-Identifier: Apache-2.0
"""A step of trees alone makes the inputs that vLLM would make."""

import pytest

from tests.harness.jobs import Engines, prompts, request

SIZES = [(0, 8, 1), (0, 5, 4), (3, 4, 3)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_its_inputs_are_those_of_vllm(engines: Engines, sizes) -> None:
    """Requests that come, end and are dropped move the others' rows."""
    names = ("window_size", "ngram_size", "verification_set_size")
    lookahead = dict(zip(names, sizes, strict=True))
    batch = [
        request(prompt, max_tokens=10 + 7 * i, temperature=0.5 * (i % 2), seed=i)
        for i, prompt in enumerate(prompts(7, seed=40))
    ]
    batch[2]["abort_after"] = 4
    result = engines.run([batch], lookahead, watch="inputs")["watched"]
    assert result["steps"] > 20
    assert result["differing"] == []
