# SPDX-License-Identifier: Apache-2.0
"""What each running request asked for, by request index, on the host."""

import numpy as np
from vllm.sampling_params import SamplingParams

from vllm_lookahead.engine.shares import nodes_within
from vllm_lookahead.params import LookaheadParams, request_params

WINDOW, NGRAM, VERIFY, TREE, VERIFIED = range(5)


class RequestSizes:
    """W, N, G of each request index, and what follows from them.

    Attributes:
        server: the sizes that the server was started with, the most of each.
        table: [5, max_num_reqs] int32, by request index: W, N, G, the largest tree T
            and the most of its nodes that are verified, the root and the candidates.
    """

    def __init__(self, max_num_reqs: int, server: LookaheadParams) -> None:
        self.server = server
        self.table = np.zeros((5, max_num_reqs), dtype=np.int32)

    def add_request(
        self, index: int, sampling_params: SamplingParams | None, chain: bool
    ) -> None:
        """Read a request's options.

        Args:
            index: the request's.
            sampling_params: None for a pooling request, which drafts nothing.
            chain: its tokens depend on the tokens before them other than through
                the model, so it drafts one candidate and no window.
        """
        params = None
        if sampling_params is not None:
            params = request_params(sampling_params.extra_args, self.server)
        if params is None:
            params = LookaheadParams(0, 2, 0)
        elif chain:
            params = params.as_chain()
        self.table[:, index] = (
            params.fed_window_size,
            params.ngram_size,
            params.verification_set_size,
            params.max_tree_size,
            1 + params.max_candidate_nodes,
        )

    def num_nodes(self, index: int, most: int) -> int:
        """Nodes to feed for a request.

        Args:
            index: the request's.
            most: what there is room for.
        """
        *_, tree, verified = self.table[:, index].tolist()
        return nodes_within(tree, verified, most)
