# SPDX-License-Identifier: Apache-2.0
"""A K/V cache that holds what plain decoding needs, and no tree besides."""

import pytest

from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, request, same_as_plain
from tests.v1.test_lossless import FULL, TREE


@pytest.mark.parametrize("lookahead", [TREE, FULL], ids=["tree", "full"])
def test_nobody_is_preempted(engines: Engines, lookahead: dict[str, int]) -> None:
    texts = [[20 + i, 21 + i] * 15 for i in range(4)]
    jobs = [[request(t, max_tokens=24) for t in texts]]
    options = {"num_gpu_blocks_override": 9}  # one is vLLM's own
    result = same_as_plain(engines, jobs, lookahead, **options)
    assert result["metrics"]["vllm:num_preemptions"] == 0
    assert result["metrics"][ACCEPTED] > 0
