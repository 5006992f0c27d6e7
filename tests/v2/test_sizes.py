# SPDX-License-Identifier: Apache-2.0
"""What the host knows of each request slot."""

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.params import LookaheadParams


@pytest.mark.parametrize(
    ("num_drafts", "most", "nodes"),
    [(2, 99, 12), (2, 12, 12), (2, 11, 7), (2, 5, 5), (1, 99, 2), (2, 1, 1)],
)
def test_num_nodes(num_drafts: int, most: int, nodes: int) -> None:
    sizes = RequestSizes(8, LookaheadParams(3, 3, 3))
    sizes.add_request(1, SamplingParams(), chain=False)
    assert sizes.num_nodes(1, num_drafts, most) == nodes
    sizes.add_request(1, SamplingParams(), chain=True)
    assert sizes.num_nodes(1, num_drafts, most) == min(nodes, 3)
    sizes.add_request(1, SamplingParams(extra_args={"lookahead": 0}), chain=False)
    assert sizes.num_nodes(1, num_drafts, most) == 1
