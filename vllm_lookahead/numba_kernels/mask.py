# SPDX-License-Identifier: Apache-2.0
"""The tree part of the attention mask."""

import numpy as np
import torch

from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.numba_kernels.arrays import array
from vllm_lookahead.numba_kernels.jit import kernel


@kernel
def _ancestors_kernel(
    parents,  # [B, T] int32
    sees,  # [B, T, T] bool out
):
    for b in range(parents.shape[0]):
        for node in range(parents.shape[1]):
            parent = parents[b, node]
            if parent >= 0:  # a node sees what its parent sees
                sees[b, node] = sees[b, parent]
            else:
                sees[b, node] = False
            sees[b, node, node] = True


def ancestors(tree: DraftTree) -> np.ndarray:
    """`core.mask.ancestors`."""
    batch, size = tree.parents.shape
    sees = np.empty((batch, size, size), np.bool_)
    _ancestors_kernel(array(tree.parents, torch.int32), sees)
    return sees
