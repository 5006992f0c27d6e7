# SPDX-License-Identifier: Apache-2.0
"""Record in the pages the tokens whose K/V is final."""

import torch

from vllm_lookahead.core.pages import EMPTY, BlockPages


def write_tokens(pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Record tokens in the slots that now hold their K/V.

    A block whose first slot is written has a new owner: its rings and window are
    emptied, so that nothing of the previous owner remains visible.

    Args:
        pages: written in place.
        slots: [n] int64, physical slots; negative ones are skipped.
        tokens: [n] int32 or int64.
    """
    for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
        if slot < 0:
            continue
        block, offset = divmod(slot, pages.block_size)
        pages.tokens[block, offset] = token
        if offset == 0:
            pages.ring[block] = EMPTY
            pages.ring_count[block] = 0
            pages.window[block] = EMPTY
            pages.answer_count[block] = 0
