# SPDX-License-Identifier: Apache-2.0
"""File every place of a request's pages under its last tokens, and look it up.

Reference: `core.draft.index`. One launch of B x splits programs files all places in
tables of cells. Newer places have larger numbers, so that an atomic maximum keeps the
newest. A cell's upper half is the number of the launch, so that
tables are never emptied: what an earlier launch filed is older than everything.

A place's number tells where it is. Of a ring of SIZE cells the entry in cell c has a
number of which number % SIZE = c; as the oldest entry may be in any cell, a block takes
2 * SIZE numbers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.index import (
    MAX_ANSWER_CELLS,
    num_answer_cells,
    num_cells,
)
from vllm_lookahead.core.pages import CONTEXT, BlockPages, num_recent_blocks
from vllm_lookahead.triton_kernels.checks import Checked, expect, expect_batch
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN, expect_pages, load_slot

# Numbers of the history begin here; those below are of rings.
HISTORY = tl.constexpr(1 << 30)
# A context is three tokens here: near, middle and far.
MOST = tl.constexpr(CONTEXT)
assert CONTEXT == 3

_checked = Checked()

_TILE = 512  # places that a program files together
# A split per tile; fewer in a large batch, whose requests fill a GPU by themselves.
_MAX_SPLITS, _MIN_SPLITS, _MAX_PROGRAMS = 128, 8, 2048
_MOST_LAUNCHES = 2**31 - 1
MAX_TABLES = 256


@dataclass
class IndexTables:
    """Scratch: nothing in it outlives a step.

    A batch of more requests than MAX_TABLES drafts for the others from bigrams alone:
    with so many, no tree has room for a candidate.

    Attributes:
        text: [rows, cells] int64, launch << 32 | number of the place.
        answers: [rows, cells] int64, likewise.
        epoch: [1] int32, number of the last launch; the device counts, so that a CUDA
            graph may hold it.
    """

    text: torch.Tensor
    answers: torch.Tensor
    epoch: torch.Tensor
    num_launches: int = 0

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_tokens: int, device: torch.device | str
    ) -> "IndexTables":
        """For block tables of so many tokens."""

        rows = min(max_num_reqs, MAX_TABLES)

        def zeros(cells: int) -> torch.Tensor:
            return torch.zeros(rows, cells, dtype=torch.int64, device=device)

        epoch = torch.zeros(1, dtype=torch.int32, device=device)
        return cls(zeros(num_cells(max_tokens)), zeros(MAX_ANSWER_CELLS), epoch)

    def begin(self) -> None:
        """A launch of its own: all cells are empty."""
        if self.num_launches == _MOST_LAUNCHES:
            self.text.zero_()
            self.answers.zero_()
            self.epoch.zero_()
            self.num_launches = 0
        self.num_launches += 1
        self.epoch.add_(1)


@triton.jit
def hash_token(h, token):
    """One more token of a context: `core.draft.index.cell_of`."""
    h = ((h ^ token.to(tl.uint32, bitcast=True)) + 0x9E3779B9) * 0x85EBCA6B
    return h ^ (h >> 15)


@triton.jit
def _raise(cells_ptr, h, value, mask, CELLS: tl.constexpr):
    """Put a value into a cell, unless it holds a greater one."""
    cell_ptr = cells_ptr + (h & (CELLS - 1)).to(tl.int64)
    # Most places of a text are not the newest of their kind, and many share a cell: a
    # look, be it at an old value, spares them the queue for it.
    held = tl.load(cell_ptr, mask=mask, other=0, cache_modifier=".cg")
    tl.atomic_max(cell_ptr, value, mask=mask & (held < value), sem="relaxed")


@triton.jit
def _file(
    cells_ptr,  # [CELLS] int64 of this request
    near,  # tokens of contexts, the nearest first, as the next two
    middle,
    far,
    live,
    number,
    epoch,
    CELLS: tl.constexpr,
):
    """File places under one, two and three tokens, as far as they are known."""
    value = (epoch.to(tl.int64) << 32) | number.to(tl.int64)
    live = live & (near != NO_TOKEN)
    h = hash_token(tl.zeros_like(near).to(tl.uint32), near)
    _raise(cells_ptr, h, value, live, CELLS)
    live = live & (middle != NO_TOKEN)
    h = hash_token(h, middle)
    _raise(cells_ptr, h, value, live, CELLS)
    live = live & (far != NO_TOKEN)
    h = hash_token(h, far)
    _raise(cells_ptr, h, value, live, CELLS)


@triton.jit
def _ring_entry(
    count_ptr,  # [num_blocks] int32, entries ever put into each block's ring
    table_ptr,  # [max_blocks] int32 of this request
    first_block,  # logical
    entry,  # of the rings from that block on, oldest first
    SIZE: tl.constexpr,  # of a ring
):
    """Whether the entry is there, its block's ring, and its number."""
    live = entry >= 0
    logical = first_block + entry // SIZE
    block = tl.load(table_ptr + logical, mask=live, other=0).to(tl.int64)
    put = tl.load(count_ptr + block, mask=live, other=0)
    oldest = tl.maximum(put - SIZE, 0)
    column = entry % SIZE
    number = logical * (2 * SIZE) + oldest % SIZE + column
    return live & (oldest + column < put), block, number


@jit
def _file_kernel(
    text_cells_ptr,  # [rows, stride_text] int64, in and out, CELLS of a row
    answer_cells_ptr,  # [rows, stride_answers] int64, in and out, ANSWER_CELLS of a row
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_SIZE, WIDTH] int32
    ring_count_ptr,  # [num_blocks] int32
    answers_ptr,  # [num_blocks, KEPT, ANSWER] int32
    answer_count_ptr,  # [num_blocks] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    root_ptr,  # [B] int32
    wanted_ptr,  # [B] int32, G
    max_nodes_ptr,  # [B] int32
    epoch_ptr,  # [1] int32
    num_tables,
    splits,
    stride_text,
    stride_answers,
    stride_table,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,  # N+1
    KEPT: tl.constexpr,  # A
    ANSWER: tl.constexpr,  # CONTEXT + R
    RECENT: tl.constexpr,  # blocks at the end, whose rings are read
    CELLS: tl.constexpr,
    ANSWER_CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if b >= num_tables:
        return
    if (tl.load(wanted_ptr + b) <= 0) | (tl.load(max_nodes_ptr + b) <= 1):
        return
    position = tl.load(position_ptr + b)
    table_ptr = block_table_ptr + b * stride_table
    text_cells_ptr += b * stride_text
    answer_cells_ptr += b * stride_answers
    epoch = tl.load(epoch_ptr)
    num_blocks = tl.cdiv(position, BLOCK_SIZE)
    first = tl.program_id(1) * BLOCK
    step = splits * BLOCK
    offset = tl.arange(0, BLOCK)

    # The newest first: what is older then finds its cell taken.
    for start in range(first, position, step):
        at = position - 1 - start - offset
        live = at >= 0
        slot = load_slot(table_ptr, at, live, BLOCK_SIZE)
        near = tl.load(tokens_ptr + slot, mask=live, other=NO_TOKEN)
        slot = load_slot(table_ptr, at - 1, at >= 1, BLOCK_SIZE)
        middle = tl.load(tokens_ptr + slot, mask=at >= 1, other=NO_TOKEN)
        slot = load_slot(table_ptr, at - 2, at >= 2, BLOCK_SIZE)
        far = tl.load(tokens_ptr + slot, mask=at >= 2, other=NO_TOKEN)
        inside = live & (at + 1 < position)
        slot = load_slot(table_ptr, at + 1, inside, BLOCK_SIZE)
        following = tl.load(tokens_ptr + slot, mask=inside, other=NO_TOKEN)
        following = tl.where(inside, following, tl.load(root_ptr + b))
        live = live & (following != NO_TOKEN)
        _file(text_cells_ptr, near, middle, far, live, at + HISTORY, epoch, CELLS)

    oldest = tl.maximum(num_blocks - RECENT, 0)
    num_recent = tl.minimum(num_blocks, RECENT)
    if RING_SIZE > 0:
        total = num_recent * RING_SIZE
        for start in range(first, total, step):
            entry = total - 1 - start - offset
            live, block, number = _ring_entry(
                ring_count_ptr, table_ptr, oldest, entry, RING_SIZE
            )
            gram_ptr = ring_ptr + (block * RING_SIZE + number % RING_SIZE) * WIDTH
            number *= WIDTH
            far = tl.full([BLOCK], NO_TOKEN, tl.int32)
            middle = tl.load(gram_ptr, mask=live, other=NO_TOKEN)
            near = tl.load(gram_ptr + 1, mask=live, other=NO_TOKEN)
            for at in range(1, WIDTH - 1):
                following = tl.load(gram_ptr + at + 1, mask=live, other=NO_TOKEN)
                filed = live & (following != NO_TOKEN)
                _file(
                    text_cells_ptr, near, middle, far, filed, number + at, epoch, CELLS
                )
                far = middle
                middle = near
                near = following

    total = num_recent * KEPT
    for start in range(first, total, step):
        entry = total - 1 - start - offset
        live, block, number = _ring_entry(
            answer_count_ptr, table_ptr, oldest, entry, KEPT
        )
        answer_ptr = answers_ptr + (block * KEPT + number % KEPT) * ANSWER
        near = tl.load(answer_ptr, mask=live, other=NO_TOKEN)
        middle = tl.load(answer_ptr + 1, mask=live, other=NO_TOKEN)
        far = tl.load(answer_ptr + 2, mask=live, other=NO_TOKEN)
        _file(answer_cells_ptr, near, middle, far, live, number, epoch, ANSWER_CELLS)


def file_contexts(
    pages: BlockPages,
    batch: RequestBatch,
    tables: IndexTables,
    splits: int | None = None,
) -> None:
    """File what the pages of a batch's requests hold.

    Args:
        pages: to be filed.
        batch: B requests. Of one with verification_set_size 0, or max_nodes below 2,
            nothing is read.
        tables: written, of the first requests that there are tables for.
        splits: of each request's context; by default from B and the width of the
            block table.
    """
    b, max_blocks = batch.block_table.shape
    ring_size, kept = pages.ring.shape[1], pages.answers.shape[1]
    cells = num_cells(max_blocks * pages.block_size)
    answer_cells = num_answer_cells(pages, max_blocks)
    recent = num_recent_blocks(pages.block_size)
    own = tables.text, tables.answers, tables.epoch
    tensors = *own, *vars(pages).values(), *vars(batch).values()
    if tensors not in _checked:
        expect_batch(batch)
        expect_pages(pages)
        expect("tables.text", tables.text, (-1, -1), torch.int64)
        expect("tables.answers", tables.answers, (-1, -1), torch.int64)
        expect("tables.epoch", tables.epoch, (1,))
        if tables.text.shape[1] < cells or tables.answers.shape[1] < answer_cells:
            raise ValueError(
                f"tables of {tables.text.shape[1]} cells are too small for "
                f"{max_blocks} blocks of {pages.block_size} tokens"
            )
        most = max(ring_size * pages.ring.shape[2], kept) * 2 * max_blocks
        if max(most, max_blocks * pages.block_size) > HISTORY.value:
            raise ValueError(f"places of {max_blocks} blocks cannot be numbered")
        _checked.add(tensors)
    tables.begin()
    if not b:
        return
    if splits is None:
        places = max(max_blocks * pages.block_size, recent * max(ring_size, kept))
        tiles = triton.next_power_of_2(triton.cdiv(places, _TILE))
        splits = min(tiles, _MAX_SPLITS, max(_MIN_SPLITS, _MAX_PROGRAMS // b))
    _file_kernel[(b, splits)](
        tables.text,
        tables.answers,
        pages.tokens,
        pages.ring,
        pages.ring_count,
        pages.answers,
        pages.answer_count,
        batch.block_table,
        batch.position,
        batch.root,
        batch.verification_set_size,
        batch.max_nodes,
        tables.epoch,
        len(tables.text),
        splits,
        tables.text.stride(0),
        tables.answers.stride(0),
        batch.block_table.stride(0),
        BLOCK_SIZE=pages.block_size,
        RING_SIZE=ring_size,
        WIDTH=pages.ring.shape[2],
        KEPT=kept,
        ANSWER=pages.answers.shape[2],
        RECENT=recent,
        CELLS=cells,
        ANSWER_CELLS=answer_cells,
        BLOCK=_TILE,
        num_warps=4,
    )


@triton.jit
def hashes_of(near, middle, far, LENGTHS: tl.constexpr):
    """Of contexts [n], by how many of their tokens.

    Returns:
        h: [n, LENGTHS] uint32; column 0 is of one token.
        known: [n, LENGTHS], whether a context has so many.
    """
    length = tl.arange(0, LENGTHS)[None, :] + 1
    one = hash_token(tl.zeros_like(near).to(tl.uint32), near)
    two = hash_token(one, middle)
    three = hash_token(two, far)
    h = tl.where(length == 1, one[:, None], two[:, None])
    h = tl.where(length == 3, three[:, None], h)
    known = (near != NO_TOKEN)[:, None] & (length <= MOST)
    known = known & ((length < 2) | (middle != NO_TOKEN)[:, None])
    known = known & ((length < 3) | (far != NO_TOKEN)[:, None])
    return h, known


@triton.jit
def _filed_number(cells_ptr, h, known, epoch, CELLS: tl.constexpr):
    """What this launch filed in each cell: whether anything, and its number."""
    cell_ptr = cells_ptr + (h & (CELLS - 1)).to(tl.int64)
    held = tl.load(cell_ptr, mask=known, other=0)
    found = known & ((held >> 32).to(tl.int32) == epoch)
    return found, tl.where(found, held & 0xFFFFFFFF, 0).to(tl.int32)


@triton.jit
def _text_token(
    tokens_ptr,
    ring_ptr,
    table_ptr,
    at,  # position in the history
    in_history,
    gram_ptr,  # offset of an n-gram
    place,  # in the n-gram
    in_ring,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
):
    slot = load_slot(table_ptr, at, in_history, BLOCK_SIZE)
    token = tl.load(tokens_ptr + slot, mask=in_history, other=NO_TOKEN)
    if RING_SIZE > 0:
        of_ring = tl.load(ring_ptr + gram_ptr + place, mask=in_ring, other=NO_TOKEN)
        token = tl.where(in_ring, of_ring, token)
    return token


@triton.jit
def find_text(
    cells_ptr,  # [CELLS] int64 of this request
    tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_SIZE, WIDTH] int32
    table_ptr,  # [max_blocks] int32 of this request
    position,
    root,
    near,  # [n] int32 tokens of contexts, the nearest first, as the next two
    middle,
    far,
    h,  # [n, LENGTHS], as `hashes_of` gives it, as the next
    known,
    epoch,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The newest token that followed the most of each context, [n], and how many agree.

    NO_TOKEN and 0 where none was found.
    """
    length = tl.arange(0, h.shape[1])[None, :] + 1
    found, number = _filed_number(cells_ptr, h, known, epoch, CELLS)
    in_history = found & (number >= HISTORY)
    at = tl.where(in_history, number - HISTORY, 0)
    in_ring = found & (number < HISTORY)
    place = number % WIDTH
    gram = tl.zeros_like(number).to(tl.int64)
    if RING_SIZE > 0:
        entry = tl.where(in_ring, number // WIDTH, 0)
        logical = entry // (2 * RING_SIZE)
        block = tl.load(table_ptr + logical, mask=in_ring, other=0).to(tl.int64)
        gram = (block * RING_SIZE + entry % RING_SIZE) * WIDTH
    for back in tl.static_range(MOST):
        token = _text_token(
            tokens_ptr,
            ring_ptr,
            table_ptr,
            at - back,
            in_history & (at >= back) & (back < length),
            gram,
            place - back,
            in_ring & (place >= back) & (back < length),
            BLOCK_SIZE,
            RING_SIZE,
        )
        own = near if back == 0 else (middle if back == 1 else far)
        found = found & ((back >= length) | (token == own[:, None]))
    following = _text_token(
        tokens_ptr,
        ring_ptr,
        table_ptr,
        at + 1,
        found & in_history & (at + 1 < position),
        gram,
        place + 1,
        found & in_ring,
        BLOCK_SIZE,
        RING_SIZE,
    )
    following = tl.where(in_history & (at + 1 >= position), root, following)
    agreement = tl.max(tl.where(found, length, 0), 1)
    best = found & (length == agreement[:, None])
    token = tl.sum(tl.where(best, following, 0), 1)
    return tl.where(agreement > 0, token, NO_TOKEN), agreement


@triton.jit
def find_answer(
    cells_ptr,  # [CELLS] int64 of this request
    answers_ptr,  # [num_blocks, KEPT, ANSWER] int32
    table_ptr,  # [max_blocks] int32 of this request
    near,  # [n] int32 tokens of contexts, the nearest first, as the next two
    middle,
    far,
    h,  # [n, LENGTHS], as `hashes_of` gives it, as the next
    known,
    epoch,
    KEPT: tl.constexpr,
    ANSWER: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The newest answer after the most of each context, and how many tokens agree.

    Returns:
        entry: [n] int64, block * KEPT + cell.
        agreement: [n] int32, 0 where there is none.
    """
    length = tl.arange(0, h.shape[1])[None, :] + 1
    found, number = _filed_number(cells_ptr, h, known, epoch, CELLS)
    logical = number // (2 * KEPT)
    block = tl.load(table_ptr + logical, mask=found, other=0).to(tl.int64)
    entry = block * KEPT + number % KEPT
    answer_ptr = answers_ptr + entry * ANSWER
    for back in tl.static_range(MOST):
        reads = found & (back < length)
        token = tl.load(answer_ptr + back, mask=reads, other=NO_TOKEN)
        own = near if back == 0 else (middle if back == 1 else far)
        found = found & ((back >= length) | (token == own[:, None]))
    agreement = tl.max(tl.where(found, length, 0), 1)
    best = found & (length == agreement[:, None])
    return tl.sum(tl.where(best, entry, 0), 1), agreement
