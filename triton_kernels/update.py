# SPDX-License-Identifier: Apache-2.0
"""Record what a step emitted; harvest the window and slide it.

Reference: `core.update`.
"""

import itertools

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.checks import (
    INTEGERS,
    Checked,
    expect,
    expect_batch,
    expect_tree,
)
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import (
    NO_TOKEN,
    empty_pages,
    expect_pages,
    load_slot,
)

KIND_WINDOW = tl.constexpr(WINDOW)

_checked = Checked()


@jit
def _update_kernel(
    page_tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32, in and out, as the four below
    ring_ptr,  # [num_blocks, RING_SIZE, ROWS+2] int32
    ring_count_ptr,  # [num_blocks] int32
    window_ptr,  # [num_blocks, ROWS, COLUMNS] int32
    answer_count_ptr,  # [num_blocks] int32
    tokens_ptr,  # [B, T] int32
    kinds_ptr,  # [B, T] int32
    num_nodes_ptr,  # [B] int32
    sampled_ptr,  # [B, T]
    emitted_ptr,  # [B, N] int32
    num_emitted_ptr,  # [B] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    window_size_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    stride_tree,
    stride_sampled,
    stride_table,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # N-1 of the pages
    COLUMNS: tl.constexpr,  # W of the pages
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + b)
    if num_nodes == 0:
        return
    position = tl.load(position_ptr + b)
    num_emitted = tl.load(num_emitted_ptr + b)
    table_ptr = block_table_ptr + b * stride_table
    tokens_ptr += b * stride_tree
    sampled_ptr += b * stride_sampled

    # The last token emitted is the next root: its K/V is not computed yet.
    ahead = tl.arange(0, BLOCK_N) + 1
    final = ahead < tl.minimum(num_emitted, N)
    slot = load_slot(table_ptr, position + ahead, final, BLOCK_SIZE)
    token = tl.load(emitted_ptr + b * N + ahead - 1, mask=final, other=0)
    tl.store(page_tokens_ptr + slot, token, mask=final)
    fresh = final & (slot % BLOCK_SIZE == 0)
    empty_pages(
        ring_ptr,
        ring_count_ptr,
        window_ptr,
        answer_count_ptr,
        slot // BLOCK_SIZE,
        fresh,
        RING_SIZE * (ROWS + 2),
        ROWS * COLUMNS,
    )
    if COLUMNS == 0:
        return

    node = tl.arange(0, BLOCK_T)
    live = node < tl.minimum(num_nodes, T)
    kind = tl.load(kinds_ptr + b * stride_tree + node, mask=live, other=0)
    in_window = live & (kind == KIND_WINDOW)
    width = tl.load(window_size_ptr + b)
    rows = tl.load(ngram_size_ptr + b) - 1
    r = tl.arange(0, BLOCK_ROWS)[:, None]
    j = tl.arange(0, BLOCK_COLUMNS)
    in_page = (r < ROWS) & (j < COLUMNS)[None, :]
    tail = tl.load(table_ptr + (position + num_emitted - 1) // BLOCK_SIZE)
    tail = tail.to(tl.int64)
    window_ptrs = window_ptr + (tail * ROWS + r) * COLUMNS + j[None, :]
    if tl.sum(in_window.to(tl.int32), 0) != width * rows - 1:
        # No window, or not all of it: the one there was follows the tail.
        old_tail = tl.load(table_ptr + tl.maximum(position - 1, 0) // BLOCK_SIZE)
        old_tail = old_tail.to(tl.int64)
        num_rows = tl.where((tail != old_tail) & (width > 0), ROWS, 0)
        follows = (r < num_rows) & (j < COLUMNS)[None, :]
        old_ptrs = window_ptr + (old_tail * ROWS + r) * COLUMNS + j[None, :]
        kept = tl.load(old_ptrs, mask=follows, other=NO_TOKEN)
        tl.debug_barrier()  # the new tail's page may be one that was emptied above
        tl.store(window_ptrs, kept, mask=follows)
        return

    # Cell (r, j) is node first + r * width + j, but (0, 0) is the root.
    first = num_nodes - width * rows
    inside = j < width
    key = tl.load(tokens_ptr + tl.where(j == 0, 0, first + j), mask=inside, other=0)
    left = tl.where(j == 1, 0, first + j - 1)
    before = tl.load(tokens_ptr + left, mask=inside & (j > 0), other=0)
    slot = load_slot(table_ptr, position - 1, position > 0, BLOCK_SIZE)
    previous = tl.load(page_tokens_ptr + slot, mask=position > 0, other=NO_TOKEN)
    before = tl.where(j == 0, previous, before)

    # Slide: rows move up, what the model says after the last row is the new one.
    below = first + (r + 1) * width + j[None, :]
    slid = tl.load(
        tokens_ptr + below, mask=(r + 1 < rows) & inside[None, :], other=NO_TOKEN
    )
    last = (rows - 1) * width + j[None, :]
    last = tl.where(last == 0, 0, first + last)
    is_new = (r == rows - 1) & inside[None, :]
    new = tl.load(sampled_ptr + last, mask=is_new, other=NO_TOKEN).to(tl.int32)
    slid = tl.where(is_new, new, slid)

    # The new tail's page may be one that was emptied above.
    tl.debug_barrier()
    tl.store(window_ptrs, slid, mask=in_page)
    count = tl.load(ring_count_ptr + tail)
    cell = tail * RING_SIZE + (count + j) % RING_SIZE
    ngram_ptr = ring_ptr + cell * (ROWS + 2)
    tl.store(ngram_ptr, before, mask=inside)
    tl.store(ngram_ptr + 1, key, mask=inside)
    tl.store(ngram_ptr[None, :] + 2 + r, slid, mask=(r < ROWS) & inside[None, :])
    tl.debug_barrier()  # every warp has read the count
    tl.store(ring_count_ptr + tail, count + width)


def update(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    sampled: torch.Tensor,
    verdict: Verdict,
) -> None:
    """Record the tokens emitted, harvest an n-gram per column, slide the window.

    Args:
        pages: written in place.
        batch: the requests as they were when the trees were built.
        tree: as fed. One of 0 nodes is padding: nothing is written.
        sampled: [B, T] int32 or int64, the model's token after each node; only
            those after the window's last row are read.
        verdict: of `verify`.
    """
    b, t = batch.block_table.shape[0], tree.tokens.shape[1]
    n = verdict.tokens.shape[1]
    _, rows, columns = pages.window.shape
    given = vars(pages).values(), vars(batch).values(), vars(tree).values()
    tensors = *itertools.chain(*given), sampled, verdict.num_emitted, verdict.tokens
    if tensors not in _checked:
        expect_batch(batch)
        expect_pages(pages)
        expect_tree(tree, b, t)
        expect("sampled", sampled, (b, t), *INTEGERS, rows_apart=True)
        expect("verdict.tokens", verdict.tokens, (b, n))
        expect("verdict.num_emitted", verdict.num_emitted, (b,))
        _checked.add(tensors)
    if not b:
        return
    _update_kernel[(b,)](
        pages.tokens,
        pages.ring,
        pages.ring_count,
        pages.window,
        pages.answer_count,
        tree.tokens,
        tree.kinds,
        tree.num_nodes,
        sampled,
        verdict.tokens,
        verdict.num_emitted,
        batch.block_table,
        batch.position,
        batch.window_size,
        batch.ngram_size,
        tree.tokens.stride(0),
        sampled.stride(0),
        batch.block_table.stride(0),
        T=t,
        N=n,
        BLOCK_SIZE=pages.block_size,
        RING_SIZE=pages.ring.shape[1],
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK_N=triton.next_power_of_2(n),
        BLOCK_ROWS=triton.next_power_of_2(rows),
        BLOCK_COLUMNS=triton.next_power_of_2(max(columns, 1)),
        num_warps=4,
    )
