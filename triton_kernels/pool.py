# SPDX-License-Identifier: Apache-2.0
"""Look up the n-gram pool.

Reference: `core.draft.pool`. Two launches: the context is cut into splits that scan
it side by side, then one program per request ranks what they found.

An entry is numbered by age as block * ENTRIES + column, where a block's columns
are its ring, oldest first, and then its slots. Entries rank by class (how many
tokens before the key agree), then by age. A split lists the newest of each class
and counts them all, so that an entry's rank is a matter of adding counts: nothing
is sorted.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft import pool as reference
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.triton_kernels.checks import Checked, expect, expect_batch
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN, expect_pages, load_slot

MAX_CONTEXT = tl.constexpr(reference.MAX_CONTEXT)
CLASSES = tl.constexpr(reference.MAX_CONTEXT + 1)
BLOCK_CLASSES = tl.constexpr(triton.next_power_of_2(reference.MAX_CONTEXT + 1))

_checked = Checked()

# Entries that a program of the scan looks at together; a counter holds the most.
_MIN_TILE, _MAX_TILE = 512, 2048
COUNTER_BITS = tl.constexpr(_MAX_TILE.bit_length())
COUNTER_MASK = tl.constexpr((1 << _MAX_TILE.bit_length()) - 1)
PACKED = tl.constexpr(60 // _MAX_TILE.bit_length())  # two words count all classes
# A split per _MIN_TILE entries; fewer in a large batch, whose requests fill a GPU by
# themselves.
_MAX_SPLITS, _MIN_SPLITS, _MAX_PROGRAMS = 128, 8, 2048


def _scan_size(max_blocks: int, entries: int, listed: int) -> tuple[int, int]:
    """Splits of the only request of a batch, and the tile of each; powers of two.

    A request of any length up to 128 splits of a tile, which is 51k tokens at W=15,
    G=15 and blocks of 16, is scanned in one round.

    Args:
        max_blocks: of a request.
        entries: of a block.
        listed: entries that are ranked.
    """
    # The second launch holds a tile of splits times listed entries in registers.
    most = min(_MAX_SPLITS, 8192 // triton.next_power_of_2(listed))
    tiles = triton.cdiv(max_blocks * entries, _MIN_TILE)
    splits = min(most, triton.next_power_of_2(tiles))
    per_split = triton.next_power_of_2(triton.cdiv(max_blocks, splits) * entries)
    return splits, min(max(per_split, _MIN_TILE), _MAX_TILE)


@dataclass
class LookupScratch:
    """What the first launch tells the second.

    Attributes:
        found: [programs, MAX_CONTEXT + 1, L] int32, entries of each class, newest
            first; L is the most entries ranked per request.
        count: [programs, MAX_CONTEXT + 1] int32, entries of each class, listed or
            not.
    """

    found: torch.Tensor
    count: torch.Tensor

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_candidates: int, device: torch.device | str
    ) -> "LookupScratch":
        programs = max(
            _MIN_SPLITS * max_num_reqs, min(_MAX_PROGRAMS, _MAX_SPLITS * max_num_reqs)
        )
        listed = max_candidates * reference.ENTRIES_PER_CANDIDATE
        classes = reference.MAX_CONTEXT + 1

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(empty(programs, classes, listed), empty(programs, classes))


@triton.jit
def _suffix(table_ptr, tokens_ptr, position, back, BLOCK_SIZE: tl.constexpr):
    """The token `back` before the root; one that agrees with nothing if unknown."""
    known = position >= back
    slot = load_slot(table_ptr, position - back, known, BLOCK_SIZE)
    token = tl.load(tokens_ptr + slot, mask=known, other=NO_TOKEN)
    return tl.where(token == NO_TOKEN, NO_TOKEN - 1, token)


@jit
def _scan_kernel(
    found_ptr,  # [B * splits, CLASSES, LISTED] int32, out
    count_ptr,  # [B * splits, CLASSES] int32, out
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_SIZE, N+1] int32
    ring_count_ptr,  # [num_blocks] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    root_ptr,  # [B] int32
    wanted_ptr,  # [B] int32
    splits,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    RING_ENTRY: tl.constexpr,  # N+1
    LISTED: tl.constexpr,
    ENTRIES: tl.constexpr,  # of a block
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    program = b * splits + split
    position = tl.load(position_ptr + b)
    root = tl.load(root_ptr + b)
    table_ptr = block_table_ptr + b * stride_table

    num_blocks = tl.cdiv(position, BLOCK_SIZE)
    num_blocks = tl.where(tl.load(wanted_ptr + b) > 0, num_blocks, 0)
    # A tile takes as long half empty: better none for the other splits.
    per_split = tl.maximum(tl.cdiv(num_blocks, splits), BLOCK // ENTRIES)
    first = split * per_split
    end = tl.minimum(first + per_split, num_blocks)

    offset = tl.arange(0, BLOCK)
    classes = tl.arange(0, BLOCK_CLASSES)
    count = tl.zeros([BLOCK_CLASSES], tl.int32)
    for start in range(0, (end - first) * ENTRIES, BLOCK):
        entry = end * ENTRIES - 1 - start - offset  # newest first
        logical = entry // ENTRIES
        column = entry % ENTRIES
        live = entry >= first * ENTRIES
        block = tl.load(table_ptr + logical, mask=live, other=0).to(tl.int64)

        index = logical * BLOCK_SIZE + column - RING_SIZE
        in_history = live & (column >= RING_SIZE) & (index < position)
        slot = block * BLOCK_SIZE + column - RING_SIZE
        key = tl.load(tokens_ptr + slot, mask=in_history, other=NO_TOKEN)
        agree = in_history & (key == root)
        context = agree.to(tl.int32) - 1
        in_history = agree  # few: their reads all start here
        for back in tl.static_range(1, MAX_CONTEXT + 1):
            suffix = _suffix(table_ptr, tokens_ptr, position, back, BLOCK_SIZE)
            known = in_history & (index >= back)
            slot = load_slot(table_ptr, index - back, known, BLOCK_SIZE)
            token = tl.load(tokens_ptr + slot, mask=known, other=NO_TOKEN)
            agree = agree & (token == suffix)
            context += agree.to(tl.int32)

        if RING_SIZE > 0:
            in_ring = live & (column < RING_SIZE)
            put = tl.load(ring_count_ptr + block, mask=in_ring, other=0)
            cell = block * RING_SIZE + (column + put) % RING_SIZE
            ngram_ptr = ring_ptr + cell * RING_ENTRY
            key = tl.load(ngram_ptr + 1, mask=in_ring, other=NO_TOKEN)
            agree = in_ring & (key == root)
            before = tl.load(ngram_ptr, mask=agree, other=NO_TOKEN)
            suffix = _suffix(table_ptr, tokens_ptr, position, 1, BLOCK_SIZE)
            context = tl.where(agree, (before == suffix).to(tl.int32), context)

        # Count each class up to each entry: PACKED counters to a word.
        own = tl.maximum(context, 0)
        shift = own % PACKED * COUNTER_BITS
        one = tl.where(context >= 0, tl.full([BLOCK], 1, tl.int64) << shift, 0)
        one_low = tl.where(own < PACKED, one, 0)
        upto_low = tl.cumsum(one_low, 0)
        upto_high = tl.cumsum(one - one_low, 0)
        upto = tl.where(own < PACKED, upto_low, upto_high) >> shift & COUNTER_MASK
        rank = tl.gather(count, own, 0) + upto.to(tl.int32) - 1
        tl.store(
            found_ptr + (program * CLASSES + context) * LISTED + rank,
            entry,
            mask=(context >= 0) & (rank < LISTED),
        )
        shift = classes % PACKED * COUNTER_BITS
        low, high = tl.sum(one_low, 0), tl.sum(one - one_low, 0)
        total = tl.where(classes < PACKED, low, high)
        count += (total >> shift & COUNTER_MASK).to(tl.int32)
    tl.store(count_ptr + program * CLASSES + classes, count, mask=classes < CLASSES)


@jit
def _select_kernel(
    candidates_ptr,  # [B, G, N-1] int32, out
    found_ptr,  # [B * splits, CLASSES, LISTED] int32
    count_ptr,  # [B * splits, CLASSES] int32
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_SIZE, N+1] int32
    ring_count_ptr,  # [num_blocks] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    root_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    wanted_ptr,  # [B] int32
    splits,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    RING_ENTRY: tl.constexpr,  # N+1
    LISTED: tl.constexpr,
    ENTRIES: tl.constexpr,
    G: tl.constexpr,
    VALUES: tl.constexpr,  # N-1
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least LISTED
    BLOCK_VALUES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + b)
    table_ptr = block_table_ptr + b * stride_table
    rank = tl.arange(0, BLOCK)
    split = splits - 1 - tl.arange(0, BLOCK_SPLITS)  # newest first
    classes = tl.arange(0, BLOCK_CLASSES)

    # Which class holds each rank, and which of its entries that is.
    count_ptrs = count_ptr + (b * splits + split) * CLASSES
    mask = (split >= 0)[:, None] & (classes < CLASSES)[None, :]
    total = tl.load(count_ptrs[:, None] + classes[None, :], mask=mask, other=0)
    total = tl.sum(total, 0)
    better = tl.cumsum(total, 0, reverse=True) - total
    mine = (better[None, :] <= rank[:, None]) & (
        rank[:, None] < (better + total)[None, :]
    )
    context = tl.sum(tl.where(mine, classes[None, :], 0), 1)
    number = rank - tl.sum(tl.where(mine, better[None, :], 0), 1)
    found = (tl.sum(mine.to(tl.int32), 1) > 0) & (rank < LISTED)

    # Which split lists that entry, and where.
    mask = found[:, None] & (split >= 0)[None, :]
    in_split = tl.load(count_ptrs[None, :] + context[:, None], mask=mask, other=0)
    upto = tl.cumsum(in_split, 1)
    passed = upto <= number[:, None]
    number -= tl.max(tl.where(passed, upto, 0), 1)
    program = b * splits + splits - 1 - tl.sum(passed.to(tl.int32), 1)
    entry_ptr = found_ptr + (program * CLASSES + context) * LISTED + number
    entry = tl.load(entry_ptr, mask=found, other=0)

    # Its values, up to the first that is not known.
    logical = entry // ENTRIES
    column = entry % ENTRIES
    ahead = tl.arange(0, BLOCK_VALUES)
    wanted_values = tl.minimum(tl.load(ngram_size_ptr + b) - 1, VALUES)
    read = found[:, None] & (ahead < wanted_values)[None, :]
    index = (logical * BLOCK_SIZE + column - RING_SIZE + 1)[:, None] + ahead[None, :]
    in_history = read & (column >= RING_SIZE)[:, None]
    is_root = in_history & (index == position)
    in_history = in_history & (index < position)
    slot = load_slot(table_ptr, index, in_history, BLOCK_SIZE)
    values = tl.load(tokens_ptr + slot, mask=in_history, other=NO_TOKEN)
    values = tl.where(is_root, tl.load(root_ptr + b), values)
    if RING_SIZE > 0:
        in_ring = found & (column < RING_SIZE)
        block = tl.load(table_ptr + logical, mask=in_ring, other=0).to(tl.int64)
        put = tl.load(ring_count_ptr + block, mask=in_ring, other=0)
        cell = block * RING_SIZE + (column + put) % RING_SIZE
        ngram_ptr = ring_ptr + cell * RING_ENTRY + 2
        in_ring_value = read & in_ring[:, None]
        value_ptrs = ngram_ptr[:, None] + ahead[None, :]
        ring_values = tl.load(value_ptrs, mask=in_ring_value, other=NO_TOKEN)
        values = tl.where(in_ring[:, None], ring_values, values)
    ended = tl.cumsum((values == NO_TOKEN).to(tl.int32), 1) > 0
    values = tl.where(ended, NO_TOKEN, values)

    # Leave out a chain that begins an earlier one.
    repeats = rank[None, :] < rank[:, None]
    for i in tl.static_range(VALUES):
        value = tl.sum(tl.where(ahead[None, :] == i, values, 0), 1)
        same = (value[:, None] == value[None, :]) | (value == NO_TOKEN)[:, None]
        repeats = repeats & same
    first = tl.sum(tl.where(ahead[None, :] == 0, values, 0), 1)
    new = (first != NO_TOKEN) & (tl.sum(repeats.to(tl.int32), 1) == 0)
    place = tl.cumsum(new.to(tl.int32), 0) - 1
    wanted = tl.minimum(tl.load(wanted_ptr + b), G)
    new = new & (place < wanted)
    num_chains = tl.sum(new.to(tl.int32), 0)

    out = candidates_ptr + (b * G + place)[:, None] * VALUES + ahead[None, :]
    tl.store(out, values, mask=new[:, None] & (ahead < VALUES)[None, :])
    # rank runs on beyond G, for a request has more entries than candidates
    rest = (rank >= num_chains) & (rank < G)
    out = candidates_ptr + (b * G + rank)[:, None] * VALUES + ahead[None, :]
    tl.store(out, NO_TOKEN, mask=rest[:, None] & (ahead < VALUES)[None, :])


def lookup(
    pages: BlockPages,
    batch: RequestBatch,
    scratch: LookupScratch,
    candidates: torch.Tensor,
    splits: int | None = None,
) -> None:
    """The best distinct continuations of each request's root.

    Args:
        pages: the pool.
        batch: B requests. One with verification_set_size 0 reads nothing.
        scratch: allocated for at least B requests and G candidates.
        candidates: [B, G, N-1] int32, out, best first, EMPTY beyond a chain's end.
        splits: of each request's context; by default from B and the width of the
            block table.
    """
    b, g = batch.block_table.shape[0], candidates.shape[1]
    num_values, ring_size = pages.window.shape[1], pages.ring.shape[1]
    listed = g * reference.ENTRIES_PER_CANDIDATE
    given = vars(pages).values(), vars(batch).values(), vars(scratch).values()
    tensors = *itertools.chain(*given), candidates
    if tensors not in _checked:
        expect_batch(batch)
        expect_pages(pages)
        expect("candidates", candidates, (b, g, num_values))
        expect("scratch.found", scratch.found, (-1, reference.MAX_CONTEXT + 1, listed))
        expect("scratch.count", scratch.count, (-1, reference.MAX_CONTEXT + 1))
        _checked.add(tensors)
    if not b or not g:
        return
    entries = ring_size + pages.block_size
    most, tile = _scan_size(batch.block_table.shape[1], entries, listed)
    if splits is None:
        splits = min(most, max(_MIN_SPLITS, _MAX_PROGRAMS // b))
    if min(scratch.found.shape[0], scratch.count.shape[0]) < b * splits:
        raise ValueError(f"scratch is too small for {b} requests")
    sizes = dict(
        BLOCK_SIZE=pages.block_size,
        RING_SIZE=ring_size,
        RING_ENTRY=num_values + 2,
        LISTED=listed,
        ENTRIES=entries,
    )
    stride_table = batch.block_table.stride(0)
    _scan_kernel[(b, splits)](
        scratch.found,
        scratch.count,
        pages.tokens,
        pages.ring,
        pages.ring_count,
        batch.block_table,
        batch.position,
        batch.root,
        batch.verification_set_size,
        splits,
        stride_table,
        **sizes,
        BLOCK=tile,
        num_warps=8 if tile <= 1024 else 16,
    )
    block = triton.next_power_of_2(listed)
    _select_kernel[(b,)](
        candidates,
        scratch.found,
        scratch.count,
        pages.tokens,
        pages.ring,
        pages.ring_count,
        batch.block_table,
        batch.position,
        batch.root,
        batch.ngram_size,
        batch.verification_set_size,
        splits,
        stride_table,
        **sizes,
        G=g,
        VALUES=num_values,
        BLOCK_SPLITS=max(most, triton.next_power_of_2(splits)),
        BLOCK=block,
        BLOCK_VALUES=triton.next_power_of_2(num_values),
        num_warps=8 if block <= 64 else 16,
    )
