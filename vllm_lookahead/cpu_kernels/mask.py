# SPDX-License-Identifier: Apache-2.0
"""The tree part of the attention mask."""

from math import inf

import torch

from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.cpu_kernels.arrays import array, output_array
from vllm_lookahead.cpu_kernels.jit import kernel


@kernel
def _mask_kernel(
    parents,  # [B, T] int32
    mask,  # [B, T, T] float32 out
):
    for b in range(parents.shape[0]):
        for node in range(parents.shape[1]):
            parent = parents[b, node]
            for other in range(parents.shape[1]):
                # A node sees what its parent sees.
                mask[b, node, other] = mask[b, parent, other] if parent >= 0 else -inf
            mask[b, node, node] = 0


def fill_mask(tree: DraftTree, mask: torch.Tensor) -> None:
    """`DraftTree.ancestors` as an additive mask.

    Args:
        tree: B trees of at most T nodes.
        mask: [B, T, T] float32, written in place: 0 where node i sees node j,
            -inf elsewhere.
    """
    _mask_kernel(array(tree.parents, torch.int32), output_array(mask, torch.float32))
