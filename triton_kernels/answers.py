# SPDX-License-Identifier: Apache-2.0
"""What the model says after each node, from its logits; and keep it in the pages.

Reference: `core.answers`.
"""

import itertools

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.answers import LANES, MAX_REJECTED, Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import CONTEXT, NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.checks import (
    Checked,
    expect,
    expect_batch,
    expect_tree,
)
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.pages import NO_TOKEN, expect_pages, load_slot

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KIND_CANDIDATE = tl.constexpr(CANDIDATE)
MOST_REJECTED = tl.constexpr(MAX_REJECTED)
BEHIND_CONTEXT = tl.constexpr(CONTEXT)

_ranked, _kept = Checked(), Checked()


@jit
def _likeliest_kernel(
    tokens_ptr,  # [n, KEPT] int32, out
    logprobs_ptr,  # [n, KEPT] float32, out
    logits_ptr,  # [n, vocab_size], rows apart
    vocab_size,
    row_stride,
    KEPT: tl.constexpr,  # R
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,  # of a lane, that is read at once
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    lane = tl.arange(0, LANES)
    depth = tl.arange(0, DEPTH)
    best = tl.full([LANES], float("-inf"), tl.float32)
    token = tl.full([LANES], NO_TOKEN, tl.int32)
    for start in range(0, vocab_size, LANES * DEPTH):
        at = start + depth[:, None] * LANES + lane[None, :]
        logit = tl.load(logits_ptr + at, mask=at < vocab_size, other=float("-inf"))
        logit = logit.to(tl.float32)
        logit = tl.where(logit == logit, logit, float("-inf"))  # never NaN
        new, deep = tl.max(logit, 0, return_indices=True)
        better = new > best
        best = tl.where(better, new, best)
        token = tl.where(better, start + deep * LANES + lane, token)

    top = tl.max(best, 0)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    total = tl.sum(tl.exp(best - top), 0)
    log_total = top + tl.log(tl.where(some, total, 1.0))
    for i in tl.static_range(KEPT):
        logit, at = tl.max(best, 0, return_indices=True)
        likeliest = tl.max(tl.where(lane == at, token, NO_TOKEN), 0)
        known = likeliest != NO_TOKEN
        tl.store(tokens_ptr + row * KEPT + i, likeliest)
        logprob = tl.where(known, logit - log_total, 0.0)
        tl.store(logprobs_ptr + row * KEPT + i, logprob)
        best = tl.where(lane == at, float("-inf"), best)
        token = tl.where(lane == at, NO_TOKEN, token)


def likeliest_tokens(
    logits: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor
) -> None:
    """The likeliest tokens of rows of logits, or nearly: `core.answers`.

    Args:
        logits: [n, V] float32, bfloat16 or float16, rows apart.
        tokens: [n, R] int32, out, the likeliest first, EMPTY where there are no more.
        logprobs: [n, R] float32, out.
    """
    n, vocab_size = logits.shape
    tensors = logits, logprobs, tokens
    if tensors not in _ranked:
        expect("logits", logits, (n, -1), *FLOATS, rows_apart=True)
        expect("tokens", tokens, (n, -1))
        expect("logprobs", logprobs, tuple(tokens.shape), torch.float32)
        _ranked.add(tensors)
    if not n:
        return
    _likeliest_kernel[(n,)](
        tokens,
        logprobs,
        logits,
        vocab_size,
        logits.stride(0),
        KEPT=tokens.shape[1],
        LANES=LANES,
        DEPTH=8,
        num_warps=8,
    )


@jit
def _keep_answers_kernel(
    answers_ptr,  # [num_blocks, KEPT, CONTEXT + R] int32, in and out, as the two below
    answer_logprobs_ptr,  # [num_blocks, KEPT, R] float32
    answer_count_ptr,  # [num_blocks] int32
    page_tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    tokens_ptr,  # [B, T] int32, as the two below
    parents_ptr,
    kinds_ptr,
    num_nodes_ptr,  # [B] int32
    path_ptr,  # [B, N] int32
    num_emitted_ptr,  # [B] int32
    said_ptr,  # [n, R] int32
    logprobs_ptr,  # [n, R] float32
    first_row_ptr,  # [B] int32
    stride_tree,
    stride_table,
    T: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    KEPT: tl.constexpr,  # A
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    num_nodes = tl.load(num_nodes_ptr + b)
    if num_nodes == 0:
        return
    position = tl.load(position_ptr + b)
    num_emitted = tl.load(num_emitted_ptr + b)
    table_ptr = block_table_ptr + b * stride_table
    tokens_ptr += b * stride_tree
    parents_ptr += b * stride_tree

    # Every node knows where its answer goes: the likeliest rejected ones' behind those
    # of less likely ones, then those of the path.
    node = tl.arange(0, BLOCK_T)
    live = node < tl.minimum(num_nodes, T)
    kind = tl.load(kinds_ptr + b * stride_tree + node, mask=live, other=0)
    on_path = tl.full([BLOCK_T], NO_TOKEN, tl.int32)
    for i in tl.static_range(N):
        emits = i < num_emitted
        here = tl.load(path_ptr + b * N + i, mask=emits, other=NO_TOKEN)
        on_path = tl.where(node == here, i, on_path)
    rejected = live & (kind == KIND_CANDIDATE) & (on_path < 0)
    better = tl.cumsum(rejected.to(tl.int32), 0) - 1
    rejected = rejected & (better < MOST_REJECTED)
    num_rejected = tl.sum(rejected.to(tl.int32), 0)
    order = tl.where(rejected, num_rejected - 1 - better, num_rejected + on_path)
    # A ring that is turned within a step keeps the last.
    total = num_rejected + num_emitted
    keeps = (rejected | (live & (on_path >= 0))) & (order >= total - KEPT)

    block = tl.load(table_ptr + (position + num_emitted - 1) // BLOCK_SIZE)
    block = block.to(tl.int64)
    count = tl.load(answer_count_ptr + block)
    cell = block * KEPT + (count + order) % KEPT
    above = tl.where(keeps, node, NO_TOKEN)
    before = position + node * 0
    for i in tl.static_range(BEHIND_CONTEXT):
        in_tree = keeps & (above >= 0)
        token = tl.load(tokens_ptr + above, mask=in_tree, other=NO_TOKEN)
        before = tl.where(in_tree, before, before - 1)
        in_text = keeps & (above < 0) & (before >= 0)
        slot = load_slot(table_ptr, before, in_text, BLOCK_SIZE)
        of_text = tl.load(page_tokens_ptr + slot, mask=in_text, other=NO_TOKEN)
        token = tl.where(in_text, of_text, token)
        tl.store(answers_ptr + cell * (BEHIND_CONTEXT + R) + i, token, mask=keeps)
        above = tl.load(parents_ptr + above, mask=in_tree, other=NO_TOKEN)

    column = tl.arange(0, BLOCK_R)[None, :]
    row = tl.load(first_row_ptr + b).to(tl.int64) + node
    mask = keeps[:, None] & (column < R)
    said = tl.load(said_ptr + row[:, None] * R + column, mask=mask, other=NO_TOKEN)
    out = cell[:, None] * (BEHIND_CONTEXT + R) + BEHIND_CONTEXT + column
    tl.store(answers_ptr + out, said, mask=mask)
    logprob = tl.load(logprobs_ptr + row[:, None] * R + column, mask=mask, other=0.0)
    out = cell[:, None] * R + column
    tl.store(answer_logprobs_ptr + out, logprob, mask=mask)
    tl.debug_barrier()  # every warp has read the count
    tl.store(answer_count_ptr + block, count + total)


def keep_answers(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    verdict: Verdict,
    answers: Answers,
) -> None:
    """Put a step's answers into the pages of the new tail blocks.

    Args:
        pages: written in place, after `update`.
        batch: the requests as they were when the trees were drafted.
        tree: as fed. One of 0 nodes is padding: nothing is written.
        verdict: of `verify`.
        answers: of the root and the candidates; other rows are not read.
    """
    b, t = batch.block_table.shape[0], tree.tokens.shape[1]
    n, r = verdict.path.shape[1], answers.tokens.shape[1]
    own = (pages, batch, tree, answers)
    given = (vars(of).values() for of in own)
    tensors = *itertools.chain(*given), verdict.num_emitted, verdict.path
    if tensors not in _kept:
        expect_batch(batch)
        expect_pages(pages)
        expect_tree(tree, b, t)
        expect("verdict.path", verdict.path, (b, n))
        expect("verdict.num_emitted", verdict.num_emitted, (b,))
        expect("answers.tokens", answers.tokens, (-1, NUM_ANSWERS))
        shape = tuple(answers.tokens.shape)
        expect("answers.logprobs", answers.logprobs, shape, torch.float32)
        expect("answers.first_row", answers.first_row, (b,))
        _kept.add(tensors)
    if not b or not pages.answers.shape[1]:
        return
    _keep_answers_kernel[(b,)](
        pages.answers,
        pages.answer_logprobs,
        pages.answer_count,
        pages.tokens,
        batch.block_table,
        batch.position,
        tree.tokens,
        tree.parents,
        tree.kinds,
        tree.num_nodes,
        verdict.path,
        verdict.num_emitted,
        answers.tokens,
        answers.logprobs,
        answers.first_row,
        tree.tokens.stride(0),
        batch.block_table.stride(0),
        T=t,
        N=n,
        R=r,
        KEPT=pages.answers.shape[1],
        BLOCK_SIZE=pages.block_size,
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK_R=triton.next_power_of_2(r),
        num_warps=4,
    )
