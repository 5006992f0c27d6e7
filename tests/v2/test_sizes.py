# SPDX-License-Identifier: Apache-2.0
"""What the host knows of each request slot."""

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.params import LookaheadParams


@pytest.mark.parametrize(
    ("most", "nodes"), [(99, 12), (12, 12), (11, 7), (5, 5), (2, 2), (1, 1)]
)
def test_num_nodes(most: int, nodes: int) -> None:
    sizes = RequestSizes(8, LookaheadParams(3, 3, 3))
    sizes.add_request(1, SamplingParams(), chain=False)
    assert sizes.num_nodes(1, most) == nodes
    sizes.add_request(1, SamplingParams(), chain=True)
    assert sizes.num_nodes(1, most) == min(nodes, 3)
    sizes.add_request(1, SamplingParams(extra_args={"lookahead": 0}), chain=False)
    assert sizes.num_nodes(1, most) == 1
