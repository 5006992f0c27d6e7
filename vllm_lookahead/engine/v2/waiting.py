# SPDX-License-Identifier: Apache-2.0
"""Draft trees between steps, by request index.

A step's trees are made at the end of the step before, when nobody knows yet which
requests will share the next batch. So they wait in `WaitingTrees`, and `StepTrees`
gathers those of its batch.
"""

import torch

from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.triton_kernels.waiting import store_trees


class WaitingTrees:
    """The tree that each running request is fed in its next step.

    Attributes:
        columns: [4, max_num_reqs, T] int32, the four columns of `DraftTree`.
        num_nodes: [max_num_reqs] int32.
        chances: [max_num_reqs, T] float32 of each node, falling.
    """

    def __init__(
        self, max_num_reqs: int, max_tree_size: int, device: torch.device | str
    ) -> None:
        shape = (4, max_num_reqs, max_tree_size)
        self.columns = torch.zeros(shape, dtype=torch.int32, device=device)
        self.num_nodes = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.chances = torch.zeros(shape[1:], dtype=torch.float32, device=device)

    def store(
        self,
        tree: DraftTree,
        chances: torch.Tensor,
        idx_mapping: torch.Tensor,
        drafts: torch.Tensor,
    ) -> None:
        """Put a batch's trees away.

        Args:
            tree: B trees.
            chances: [B, T] float32, of each node to be accepted.
            idx_mapping: [B] integers, the request index of each.
            drafts: [B, N-1] int64, out: each tree's first candidate, padded with
                token 0; what the scheduler is told.
        """
        waiting = self.columns, self.num_nodes, self.chances
        store_trees(tree, chances, idx_mapping, *waiting, drafts)
