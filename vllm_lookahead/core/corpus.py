# SPDX-License-Identifier: Apache-2.0
"""Draft from other requests' pages as well: the K/V cache as a corpus.

What was said under the same cache salt, and is still in the cache, is read as if it
stood before the request's own text (cf. Oliaro et al. 2024, "SuffixDecoding", which
keeps past responses in a store of its own). Nothing is kept beside the pages, so
nothing is evicted beside them: a block that is given out again is emptied, and belongs
to the salt it was given out under.
"""

import hashlib
from dataclasses import dataclass, replace

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY, BlockPages

# Salts of requests without one, and of those that share with nobody.
NO_SALT, NOBODY = 0, -1
# Tokens of other requests' newest blocks that are read before a text.
CORPUS_TOKENS = 1024


@dataclass(eq=False)
class Owners:
    """Of each block whose it is: two more columns of its page.

    Attributes:
        salt: [num_blocks] int64, as `salt_of` gives it; NOBODY's are read by nobody
            but those whose block table has them.
        given: [num_blocks] int64, the greater the later it was given out.
        count: blocks ever given out.
    """

    salt: torch.Tensor
    given: torch.Tensor
    count: int = 0

    @classmethod
    def allocate(cls, num_blocks: int, device: torch.device | str = "cpu") -> "Owners":
        nobody = torch.full((num_blocks,), NOBODY, dtype=torch.int64, device=device)
        return cls(nobody, torch.zeros_like(nobody))

    def give_out(
        self, pages: BlockPages, blocks: torch.Tensor, salts: torch.Tensor
    ) -> None:
        """Blocks have new owners: nothing of the last ones' remains in their pages.

        Args:
            pages: written in place.
            blocks: [n] int64, distinct, none of them written yet by its new owner.
            salts: [n] int64.
        """
        numbers = torch.arange(
            self.count, self.count + len(blocks), device=salts.device
        )
        self.count += len(blocks)
        self.salt[blocks], self.given[blocks] = salts, numbers
        pages.tokens[blocks] = EMPTY
        pages.ring_count[blocks] = 0
        pages.answer_count[blocks] = 0

    def copy_blocks(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """As `BlockPages.copy_blocks`."""
        for column in (self.salt, self.given):
            column[dst] = column[src]

    def others(
        self, batch: RequestBatch, salts: torch.Tensor, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest blocks under each request's salt that are not its own.

        Args:
            batch: B requests.
            salts: [B] int64, of each.
            block_size: tokens of a block.

        Returns:
            blocks: [B, C] int32, the oldest first; those there are stand at the end.
            count: [B] int32, how many there are.
        """
        table, most = batch.block_table.long(), max(1, CORPUS_TOKENS // block_size)
        same = (self.salt == salts[:, None]) & (salts != NOBODY)[:, None]
        end = batch.position + batch.max_nodes  # room for a tree is the request's own
        columns = torch.arange(table.shape[1], device=table.device)
        is_own = columns * block_size < end[:, None]
        same.scatter_(1, table.where(is_own, table[:, :1]), False)
        given = self.given.where(same, -1)
        newest = given.topk(min(most, len(self.given)))
        count = (newest.values >= 0).sum(1, dtype=torch.int32)
        return newest.indices.flip(1).int(), count


def behind(
    batch: RequestBatch, blocks: torch.Tensor, count: torch.Tensor, block_size: int
) -> RequestBatch:
    """The batch as if each request's text began with other blocks' tokens.

    Args:
        batch: B requests.
        blocks, count: as `Owners.others` gives them.
        block_size: tokens of a block.
    """
    table = torch.cat([blocks, batch.block_table], 1)
    columns = torch.arange(table.shape[1], device=table.device)
    at = columns + (blocks.shape[1] - count)[:, None]
    return replace(
        batch,
        block_table=table.gather(1, at.clamp(max=table.shape[1] - 1)),
        position=batch.position + count * block_size,
    )


def salt_of(cache_salt: str | None) -> int:
    """63 bits of a request's `cache_salt`."""
    if cache_salt is None:
        return NO_SALT
    digest = hashlib.blake2b(cache_salt.encode(), digest_size=8).digest()
    return max(1, int.from_bytes(digest) >> 1)
