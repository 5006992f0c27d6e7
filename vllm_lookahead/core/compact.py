# SPDX-License-Identifier: Apache-2.0
"""Move the accepted nodes' K/V to where their tokens belong.

Node i lies in the slot of position p+i; accepted at depth d it belongs in that of p+d.
A node never lies below its target, and paths ascend, so that moves in this order
overwrite nothing that is still wanted.
"""

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.verify import Verdict


def compact(
    caches: list[torch.Tensor], batch: RequestBatch, verdict: Verdict, block_size: int
) -> None:
    """Move in place, in every cache.

    Args:
        caches: views of shape [num_blocks, block_size, ...], any strides.
        batch: the requests as they were when the trees were fed.
        verdict: what was accepted.
        block_size: tokens per block.
    """
    paths, counts = verdict.path.tolist(), verdict.num_emitted.tolist()
    for request, path, count in zip(batch.requests(), paths, counts, strict=True):
        for depth, node in enumerate(path[:count]):
            source = request.slot(request.position + node, block_size)
            target = request.slot(request.position + depth, block_size)
            if source == target:
                continue
            for cache in caches:
                moved = cache[source // block_size, source % block_size]
                cache[target // block_size, target % block_size] = moved
