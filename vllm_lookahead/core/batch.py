# SPDX-License-Identifier: Apache-2.0
"""What the core is told about the requests of one step."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Request:
    """One request of a batch in plain numbers; fields as in `RequestBatch`."""

    blocks: list[int]
    position: int
    root: int
    window_size: int
    ngram_size: int
    verification_set_size: int
    max_nodes: int

    def slot(self, position: int, block_size: int) -> int:
        """Physical slot of a position."""
        block = self.blocks[position // block_size]
        return block * block_size + position % block_size


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

    def requests(self) -> list[Request]:
        """Each in plain numbers, for loops."""
        columns = (column.tolist() for column in vars(self).values())
        return [Request(*row) for row in zip(*columns, strict=True)]

    def root_slots(self, block_size: int) -> torch.Tensor:
        """[B] int64, the physical slot of each root."""
        logical = (self.position // block_size).long()[:, None]
        block = self.block_table.gather(1, logical)[:, 0].long()
        return block * block_size + self.position % block_size
