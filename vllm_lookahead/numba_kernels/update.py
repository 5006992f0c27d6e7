# SPDX-License-Identifier: Apache-2.0
"""After a step: record the output, harvest the Jacobi window, slide it by a row."""

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.arrays import array, page_arrays
from vllm_lookahead.numba_kernels.jit import kernel


# As in write.py: a kernel in Numba's cache must not call another file's, whose changes
# would go unnoticed.
@kernel
def _write_token(tokens, ring, ring_count, window, answer_count, block, offset, token):
    tokens[block, offset] = token
    if offset == 0:  # a new owner: nothing of the previous one remains
        ring[block], ring_count[block], window[block] = EMPTY, 0, EMPTY
        answer_count[block] = 0


@kernel
def _slot(table, position, block_size):
    """Physical block of a position, and the offset in it."""
    block = min(position // block_size, table.shape[0] - 1)
    return table[block], position % block_size


@kernel
def _harvest(
    ring,  # [ring_size, N+1] the tail block's, as is the window
    count,  # n-grams ever put into the ring
    window,  # [N-1, W] out
    before_root,  # token before the root
    width,
    rows,
    tokens,  # [T]
    sampled,  # [T]
    first,  # node of the window's cell 1; cell 0 is the root
):
    """An n-gram per column into the ring; the window slides by a row."""
    window[:] = EMPTY
    before = before_root
    for column in range(width):
        gram = ring[(count + column) % ring.shape[0]]
        gram[:] = EMPTY
        gram[0] = before
        for row in range(rows):
            cell = row * width + column
            node = first + cell - 1 if cell > 0 else 0
            gram[1 + row] = tokens[node]
            if row > 0:
                window[row - 1, column] = tokens[node]
        window[rows - 1, column] = gram[1 + rows] = sampled[node]
        before = gram[1]


@kernel
def _update_kernel(
    tokens,  # [num_blocks, block_size] int32
    ring,  # [num_blocks, ring_size, N+1] int32
    ring_count,  # [num_blocks] int32
    window,  # [num_blocks, N-1, W] int32
    answer_count,  # [num_blocks] int32
    block_table,  # [B, max_blocks] int32
    position,  # [B] int32
    window_size,  # [B] int32
    ngram_size,  # [B] int32
    tree_tokens,  # [B, T] int32
    kinds,  # [B, T] int32
    num_nodes,  # [B] int32
    sampled,  # [B, T] int32
    emitted,  # [B, N] int32
    num_emitted,  # [B] int32
):
    block_size = tokens.shape[1]
    for b in range(position.shape[0]):
        table, p = block_table[b], position[b]
        # The last token emitted is the next root: its K/V is not computed yet.
        for i in range(num_emitted[b] - 1):
            block, offset = _slot(table, p + 1 + i, block_size)
            _write_token(
                tokens, ring, ring_count, window, answer_count, block, offset,
                emitted[b, i],
            )  # fmt: skip

        width, rows = window_size[b], ngram_size[b] - 1
        num_fed = 0  # cells of the window, all but the root's
        for node in range(kinds.shape[1]):
            num_fed += kinds[b, node] == WINDOW
        old_tail, offset = _slot(table, max(p - 1, 0), block_size)
        tail, _ = _slot(table, p + num_emitted[b] - 1, block_size)
        if num_fed != width * rows - 1:
            if width > 0 and tail != old_tail:
                window[tail] = window[old_tail]
            continue
        before_root = tokens[old_tail, offset]
        _harvest(
            ring[tail], ring_count[tail], window[tail], before_root, width, rows,
            tree_tokens[b], sampled[b], num_nodes[b] - num_fed,
        )  # fmt: skip
        ring_count[tail] += width


def update(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    sampled: torch.Tensor,
    verdict: Verdict,
) -> None:
    """`core.update.update`."""
    *known, _, _, answer_count = page_arrays(pages)
    _update_kernel(
        *known,
        answer_count,
        array(batch.block_table, torch.int32),
        array(batch.position, torch.int32),
        array(batch.window_size, torch.int32),
        array(batch.ngram_size, torch.int32),
        array(tree.tokens, torch.int32),
        array(tree.kinds, torch.int32),
        array(tree.num_nodes, torch.int32),
        array(sampled.int(), torch.int32),
        array(verdict.tokens, torch.int32),
        array(verdict.num_emitted, torch.int32),
    )
