# SPDX-License-Identifier: Apache-2.0
"""Sample and match at once, where every token of a batch is known: greedy ones.

Other batches are walked a level at a time, `numba_kernels.walk`.
"""

import numpy as np
import torch

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.arrays import array
from vllm_lookahead.numba_kernels.jit import kernel


@kernel
def _verify_kernel(
    tokens,  # [B, T] int32
    parents,  # [B, T] int32
    kinds,  # [B, T] int32
    sampled,  # [B, T] int32
    emitted,  # [2, B, N] int32 out: tokens, path
    num_emitted,  # [B] int32 out
):
    emitted[:] = EMPTY
    max_emitted = emitted.shape[2]
    for b in range(tokens.shape[0]):
        at, n = 0, 1
        emitted[0, b, 0], emitted[1, b, 0] = sampled[b, 0], 0
        # Children come after their parent: one pass finds the whole path.
        for node in range(1, tokens.shape[1]):
            if n == max_emitted:
                break
            if (
                parents[b, node] == at
                and kinds[b, node] == CANDIDATE
                and tokens[b, node] == sampled[b, at]
            ):
                at = node
                emitted[0, b, n], emitted[1, b, n] = sampled[b, node], node
                n += 1
        num_emitted[b] = n


def verify(tree: DraftTree, sampled: torch.Tensor, max_emitted: int) -> Verdict:
    """`core.verify.verify`."""
    num_requests = sampled.shape[0]
    emitted = np.empty((2, num_requests, max_emitted), np.int32)
    num_emitted = np.empty(num_requests, np.int32)
    _verify_kernel(
        array(tree.tokens, torch.int32),
        array(tree.parents, torch.int32),
        array(tree.kinds, torch.int32),
        array(sampled.int(), torch.int32),
        emitted,
        num_emitted,
    )
    return Verdict(*map(torch.from_numpy, (*emitted, num_emitted)))
