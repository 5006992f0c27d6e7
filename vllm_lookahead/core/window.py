# SPDX-License-Identifier: Apache-2.0
"""The Jacobi window: read or seed it, harvest its n-grams, slide it.

Paper, section 3.1 and Algorithm 2. The window starts full: cells that were never
written are seeded with runs of the request's own history, which stands in for
the paper's N-2 warm-up steps.
"""

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import WINDOW, DraftTree

# Consecutive columns start this far apart in the history: a prime, so that few
# columns coincide whatever its length.
SEED_STRIDE = 7919


def read_window(pages: BlockPages, batch: RequestBatch) -> torch.Tensor:
    """Each request's window, seeded where it is empty.

    Returns:
        [B, N-1, W] int32; cell (0, 0) means nothing.
    """
    num_rows, num_columns = pages.window.shape[1:]
    last = batch.position[:, None].long() - 1
    tail = batch.slots(last, pages.block_size)[:, 0] // pages.block_size
    window = pages.window[tail]

    device = window.device
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_columns, device=device)
    start = (column * SEED_STRIDE + row).flatten()
    seed_at = start % (last + 1).clamp(min=1)
    seed = pages.tokens.view(-1)[batch.slots(seed_at, pages.block_size)]
    seed = torch.where(seed == EMPTY, batch.root[:, None], seed)
    return torch.where(window == EMPTY, seed.view(window.shape), window)


def update_window(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    sampled: torch.Tensor,
    num_emitted: torch.Tensor,
) -> None:
    """Harvest one n-gram per column, then slide the window by a row.

    Column j's n-gram is key B0[j] and values R1[j], ..., R_{N-2}[j], new[j], where
    new[j] is the model's token after node (N-2, j). Requests whose tree carries
    no whole window keep theirs. The emitted tokens must be in the pages already
    (`write_tokens`): the window, new or kept, goes to the page of the new tail.

    Args:
        pages: written in place.
        batch: the requests as they were when the tree was built.
        tree: as fed.
        sampled: [B, T] integers, the model's token after each node.
        num_emitted: [B] int32.
    """
    num_rows, num_columns = pages.window.shape[1:]
    if not num_columns:
        return
    b = tree.tokens.shape[0]
    ring_size, block_size = pages.ring.shape[1], pages.block_size
    width, rows = batch.window_size.long(), batch.ngram_size.long() - 1
    # Every cell but the root's is a node: 0 nodes for W=1, N=2, never -1 for W=0.
    has_window = (tree.kinds == WINDOW).sum(1) == width * rows - 1
    position = batch.position[:, None].long()

    # What was fed, as [B, N-1, W]: cell (r, j) is node first + r * W_r + j - 1.
    device = tree.tokens.device
    row = torch.arange(num_rows, device=device)[:, None]
    column = torch.arange(num_columns, device=device)
    width_, rows_ = width[:, None, None], rows[:, None, None]
    first = (tree.num_nodes.long() - (width * rows - 1))[:, None, None]
    cell = row * width_ + column
    node = torch.where(cell == 0, 0, first + cell - 1)
    inside = (row < rows_) & (column < width_)
    node = node.where(inside, 0).clamp(0, tree.tokens.shape[1] - 1).view(b, -1)
    fed = tree.tokens.gather(1, node).view(b, num_rows, num_columns)
    fed = fed.masked_fill(~inside, EMPTY)
    after = sampled.int().gather(1, node).view(b, num_rows, num_columns)
    new = after.gather(1, (rows_ - 1).expand(b, 1, num_columns))
    new = new.masked_fill(column >= width_, EMPTY)

    # Slide: rows move up, `new` becomes the request's last row.
    slid = torch.cat([fed[:, 1:], new], 1)
    slid = torch.where(row == rows_ - 1, new, slid)
    slid = torch.where(inside, slid, EMPTY)

    # An n-gram is (token before the key, key, values); the key is row 0's.
    tail_slot = batch.slots(position - 1, block_size)
    before_root = pages.tokens.view(-1)[tail_slot.clamp(min=0)]
    before = torch.cat([before_root, fed[:, 0, :-1]], 1)
    ngrams = torch.cat([before[:, None], fed[:, :1], slid], 1).transpose(1, 2)

    tail = batch.slots(position + num_emitted[:, None] - 1, block_size)[:, 0]
    tail, old_tail = tail // block_size, tail_slot[:, 0] // block_size
    follows = ~has_window & (width > 0) & (tail != old_tail)
    pages.window[tail[follows]] = pages.window[old_tail[follows]]
    tail = tail[has_window]
    pages.window[tail] = slid[has_window]
    count = pages.ring_count[tail].long()
    at = (count[:, None] + column) % ring_size
    live = column < width[has_window, None]
    old = pages.ring[tail[:, None], at]
    pages.ring[tail[:, None], at] = torch.where(
        live[..., None], ngrams[has_window], old
    )
    pages.ring_count[tail] += width[has_window].int()
