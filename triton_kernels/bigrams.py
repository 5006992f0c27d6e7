# SPDX-License-Identifier: Apache-2.0
"""Complete the pool's chains from the model's bigrams.

Oracle: `core.bigrams.complete`. One program per request, one lane per chain, one
dependent load per depth.
"""

import torch
import triton
import triton.language as tl

from vllm_lookahead.core import pool
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.triton_kernels.checks import expect, expect_batch
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN

BIGRAM = tl.constexpr(pool.BIGRAM)


@jit
def _complete_kernel(
    candidates_ptr,  # [B, G, N-1] int32, in and out
    context_ptr,  # [B, G] int32, in and out
    root_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    wanted_ptr,  # [B] int32
    chain_length_ptr,  # [NUM_ORIGINS, G] int32
    bigrams_ptr,  # [V, R] int32
    vocab_size,
    successors,  # R
    G: tl.constexpr,
    VALUES: tl.constexpr,  # N-1
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK)
    mask = rank < G
    context = tl.load(context_ptr + b * G + rank, mask=mask, other=NO_TOKEN)
    nth = rank - tl.sum((context >= 0).to(tl.int32), 0)
    wanted = tl.minimum(tl.load(wanted_ptr + b), G)
    begins = (nth >= 0) & (nth < successors) & (rank < wanted)
    context = tl.where(begins, BIGRAM, context)
    tl.store(context_ptr + b * G + rank, context, mask=mask)
    is_chain = mask & (context >= 0)
    length_ptr = chain_length_ptr + context * G + rank
    length = tl.load(length_ptr, mask=is_chain, other=0)
    length = tl.minimum(length, tl.load(ngram_size_ptr + b) - 1)

    last = tl.load(root_ptr + b) + tl.zeros([BLOCK], tl.int32)
    column = tl.where(begins, nth, 0)
    for i in tl.static_range(VALUES):
        at = candidates_ptr + (b * G + rank) * VALUES + i
        token = tl.load(at, mask=is_chain, other=NO_TOKEN)
        goes_on = (token == NO_TOKEN) & (i < length) & (last >= 0) & (last < vocab_size)
        pair = last.to(tl.int64) * successors + column
        following = tl.load(bigrams_ptr + pair, mask=goes_on, other=NO_TOKEN)
        token = tl.where(goes_on, following, token)
        tl.store(at, token, mask=goes_on)
        last = token
        column = tl.zeros([BLOCK], tl.int32)


def complete(
    candidates: torch.Tensor,
    context: torch.Tensor,
    batch: RequestBatch,
    chain_length: torch.Tensor,
    bigrams: torch.Tensor,
) -> None:
    """Start chains at the root's successors, and go on where chains end early.

    Args:
        candidates: [B, G, N-1] int32 chains from the pool, completed in place.
        context: [B, G] int32, BIGRAM in place of EMPTY where a chain was begun.
        batch: B requests.
        chain_length: [NUM_ORIGINS, G] int32, most tokens worth drafting from the
            chain of that agreement and rank.
        bigrams: [V, R] int32, the model's likeliest tokens after each, EMPTY where
            unknown.
    """
    b = expect_batch(batch)
    _, g, num_values = candidates.shape
    expect("candidates", candidates, (b, g, num_values))
    expect("context", context, (b, g))
    expect("chain_length", chain_length, (pool.NUM_ORIGINS, g))
    expect("bigrams", bigrams, (-1, -1))
    if not b or not g:
        return
    _complete_kernel[(b,)](
        candidates,
        context,
        batch.root,
        batch.ngram_size,
        batch.verification_set_size,
        chain_length,
        bigrams,
        *bigrams.shape,
        G=g,
        VALUES=num_values,
        BLOCK=triton.next_power_of_2(g),
        num_warps=1,
    )
