# SPDX-License-Identifier: Apache-2.0
"""What the core is told about the requests of one step."""

from dataclasses import dataclass

import torch


@dataclass
class RequestBatch:
    """The decode requests of a step; B of them, each at its root.

    Attributes:
        block_table: [B, max_blocks] int32, physical block of each logical one.
        position: [B] int32, p: position of the root, also the number of tokens
            whose K/V is final.
        root: [B] int32, x: the last accepted token; its K/V is not computed yet.
        window_size: [B] int32, W of each request, at most the pages' W.
        ngram_size: [B] int32, N of each request, at most the pages' N.
        verification_set_size: [B] int32, G of each request.
        max_nodes: [B] int32, most nodes the request's tree may have, at least 1;
            a window that does not fit whole is left out.
    """

    block_table: torch.Tensor
    position: torch.Tensor
    root: torch.Tensor
    window_size: torch.Tensor
    ngram_size: torch.Tensor
    verification_set_size: torch.Tensor
    max_nodes: torch.Tensor

    def slots(self, position: torch.Tensor, block_size: int) -> torch.Tensor:
        """Physical slot of each position, through the request's block table.

        Args:
            position: [B, n] integers; negative ones give slot -1.
            block_size: tokens per block.

        Returns:
            [B, n] int64.
        """
        position = position.long()
        logical = position.div(block_size, rounding_mode="floor").clamp(
            0, self.block_table.shape[1] - 1
        )
        block = self.block_table.gather(1, logical).long()
        slot = block * block_size + position % block_size
        return slot.where(position >= 0, -1)
