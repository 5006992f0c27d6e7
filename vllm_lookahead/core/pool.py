# SPDX-License-Identifier: Apache-2.0
"""The n-gram pool: what the pages say may follow the root.

Two sources, one ranking. The history (prompt and output) holds an n-gram at every
position; the rings hold what the Jacobi window found. An entry whose preceding
tokens also agree with the request's suffix beats one that agrees on the key
alone; between equals the newest wins.
"""

import torch
import torch.nn.functional as F

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY, BlockPages

# Tokens before the key that are compared; a ring entry stores one.
MAX_CONTEXT = 8
# Entries looked at per candidate wanted: many continue the same way.
ENTRIES_PER_CANDIDATE = 4


def lookup(pages: BlockPages, batch: RequestBatch, max_candidates: int) -> torch.Tensor:
    """The best distinct continuations of each request's root.

    Args:
        pages: the pool; its N bounds the length of a chain.
        batch: B requests; blocks up to that of position p-1 are read.
        max_candidates: G of the result.

    Returns:
        [B, G, N-1] int32, best first, EMPTY beyond a chain's end.
    """
    b, num_blocks = batch.block_table.shape
    block_size, num_values = pages.block_size, pages.window.shape[1]
    ring_size = pages.ring.shape[1]
    length = num_blocks * block_size
    table = batch.block_table.long()
    index = torch.arange(length, device=table.device)
    root, position = batch.root[:, None], batch.position[:, None].long()

    # Entries are numbered by age, block by block, a block's ring before its slots.
    num_entries = num_blocks * (ring_size + block_size)
    age = index + (index // block_size + 1) * ring_size

    # Padded so that one can look back and ahead: index i is at MAX_CONTEXT + i.
    history = pages.tokens[table].view(b, length).masked_fill(index >= position, EMPTY)
    history = F.pad(history, (MAX_CONTEXT, num_values + 1), value=EMPTY)
    history.scatter_(1, position + MAX_CONTEXT, root)
    back = torch.arange(MAX_CONTEXT, device=table.device)
    suffix = history.gather(1, position + back)  # [B, MAX_CONTEXT], ends at p-1
    suffix = suffix.where(suffix != EMPTY, EMPTY - 1)  # agrees with nothing

    agree = (history[:, MAX_CONTEXT:][:, :length] == root) & (index < position)
    context = agree.int() - 1
    for i in reversed(range(MAX_CONTEXT)):
        agree = agree & (history[:, i : i + length] == suffix[:, i, None])
        context += agree
    score = (context * num_entries + age).where(context >= 0, -1)

    if ring_size:
        ring = pages.ring[table].view(b, num_blocks * ring_size, num_values + 2)
        agree = ring[..., 1] == root
        context_ring = agree.int() - 1 + (agree & (ring[..., 0] == suffix[:, -1:]))
        cell = torch.arange(ring_size, device=table.device)
        order = (cell - pages.ring_count[table][..., None]) % ring_size
        block = torch.arange(num_blocks, device=table.device)[:, None]
        live = block * block_size < position[..., None]  # [B, num_blocks, 1]
        age = (order + block * (ring_size + block_size)).view(b, -1)
        found = (context_ring >= 0) & live.expand(order.shape).reshape(b, -1)
        score_ring = (context_ring * num_entries + age).where(found, -1)
        score = torch.cat([score, score_ring], 1)

    count = min(max_candidates * ENTRIES_PER_CANDIDATE, score.shape[1])
    best, entry = score.topk(count)
    ahead = torch.arange(num_values, device=table.device)
    start = entry.clamp(max=length - 1) + MAX_CONTEXT + 1
    values = history.gather(1, (start[..., None] + ahead).view(b, -1))
    values = values.view(b, count, num_values)
    if ring_size:
        cell = (entry - length).clamp(min=0)[..., None].expand(values.shape)
        from_ring = entry[..., None] >= length
        values = ring[..., 2:].gather(1, cell).where(from_ring, values)
    too_long = ahead >= batch.ngram_size[:, None, None] - 1
    values = values.masked_fill((best < 0)[..., None] | too_long, EMPTY)
    # A chain ends at the first token that is not known.
    values = values.where((values != EMPTY).cumprod(-1).bool(), EMPTY)
    return _distinct(values, batch.verification_set_size, max_candidates)


def _distinct(chains: torch.Tensor, wanted: torch.Tensor, columns: int) -> torch.Tensor:
    """The first `wanted[b]` chains that are no prefix of an earlier one.

    Args:
        chains: [B, n, K] int32, best first, EMPTY beyond a chain's end.
        wanted: [B] int32.
        columns: G, columns of the result.
    """
    b, n, k = chains.shape
    same = (chains[:, :, None] == chains[:, None]) | (chains == EMPTY)[:, :, None]
    earlier = torch.ones(n, n, dtype=torch.bool, device=chains.device).tril(-1)
    new = ~(same.all(-1) & earlier).any(-1) & (chains[..., 0] != EMPTY)
    rank = new.cumsum(1) - 1
    at = rank.where(new & (rank < wanted[:, None]), columns)  # one spare column
    out = chains.new_full((b, columns + 1, k), EMPTY)
    out.scatter_(1, at[..., None].expand(chains.shape), chains)
    return out[:, :columns]
