# SPDX-License-Identifier: Apache-2.0
"""Complete the pool's chains from the model's bigrams.

Reference: `core.draft.bigrams.complete`. One program per request, one lane per chain,
one dependent load per depth.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.triton_kernels.checks import Checked, expect, expect_batch
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN

_checked = Checked()


@jit
def _complete_kernel(
    candidates_ptr,  # [B, G, N-1] int32, in and out
    root_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    wanted_ptr,  # [B] int32
    bigrams_ptr,  # [V, R] int32
    vocab_size,
    successors,  # R
    G: tl.constexpr,
    VALUES: tl.constexpr,  # N-1
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK)
    first_ptr = candidates_ptr + (b * G + rank) * VALUES
    first = tl.load(first_ptr, mask=rank < G, other=NO_TOKEN)
    nth = rank - tl.sum((first != NO_TOKEN).to(tl.int32), 0)
    wanted = tl.minimum(tl.load(wanted_ptr + b), G)
    begins = (nth >= 0) & (nth < successors) & (rank < wanted)
    length = tl.where(begins | (nth < 0), tl.load(ngram_size_ptr + b) - 1, 0)

    last = tl.load(root_ptr + b) + tl.zeros([BLOCK], tl.int32)
    column = tl.where(begins, nth, 0)
    for i in tl.static_range(VALUES):
        token = tl.load(first_ptr + i, mask=i < length, other=NO_TOKEN)
        goes_on = (token == NO_TOKEN) & (i < length) & (last >= 0) & (last < vocab_size)
        pair = last.to(tl.int64) * successors + column
        following = tl.load(bigrams_ptr + pair, mask=goes_on, other=NO_TOKEN)
        token = tl.where(goes_on, following, token)
        tl.store(first_ptr + i, token, mask=goes_on)
        last = token
        column = tl.zeros([BLOCK], tl.int32)


def complete(
    candidates: torch.Tensor, batch: RequestBatch, bigrams: torch.Tensor
) -> None:
    """Start chains at the root's successors, and go on where chains end early.

    Args:
        candidates: [B, G, N-1] int32 chains from the pool, completed in place.
        batch: B requests.
        bigrams: [V, R] int32, the model's likeliest tokens after each, EMPTY where
            unknown.
    """
    b, (_, g, num_values) = batch.block_table.shape[0], candidates.shape
    tensors = *vars(batch).values(), bigrams, candidates
    if tensors not in _checked:
        expect_batch(batch)
        expect("candidates", candidates, (b, g, num_values))
        expect("bigrams", bigrams, (-1, -1))
        _checked.add(tensors)
    if not b or not g:
        return
    _complete_kernel[(b,)](
        candidates,
        batch.root,
        batch.ngram_size,
        batch.verification_set_size,
        bigrams,
        *bigrams.shape,
        G=g,
        VALUES=num_values,
        BLOCK=triton.next_power_of_2(g),
        num_warps=1,
    )
