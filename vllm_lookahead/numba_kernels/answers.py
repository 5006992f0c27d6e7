# SPDX-License-Identifier: Apache-2.0
"""Keep what the model said after each node; and what that is, from its logits."""

import math

import numpy as np
import torch

from vllm_lookahead.core.answers import LANES, MAX_REJECTED, Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import CONTEXT, EMPTY, NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.arrays import array, page_arrays
from vllm_lookahead.numba_kernels.jit import kernel


@kernel
def _keep_answers_kernel(
    text_tokens,  # [num_blocks, block_size] int32
    answers,  # [num_blocks, A, CONTEXT + R] int32, in and out, as the next two
    answer_logprobs,  # [num_blocks, A, R] float32
    answer_count,  # [num_blocks] int32
    block_table,  # [B, max_blocks] int32
    position,  # [B] int32
    tree_tokens,  # [B, T] int32, as the next two
    parents,
    kinds,
    num_nodes,  # [B] int32
    path,  # [B, N] int32
    num_emitted,  # [B] int32
    tokens,  # [n, R] int32
    logprobs,  # [n, R] float32
    first_row,  # [B] int32
    max_rejected,
):
    block_size, kept = text_tokens.shape[1], answers.shape[1]
    order = np.empty(max_rejected + path.shape[1], np.int32)
    for b in range(position.shape[0]):
        if num_nodes[b] == 0:
            continue
        table, p, emitted = block_table[b], position[b], num_emitted[b]
        num_rejected, on_path = 0, 1
        for node in range(1, num_nodes[b]):
            if kinds[b, node] != CANDIDATE or num_rejected == max_rejected:
                break
            if on_path < emitted and path[b, on_path] == node:
                on_path += 1
            else:
                order[num_rejected] = node
                num_rejected += 1
        order[:num_rejected] = order[:num_rejected][::-1].copy()
        order[num_rejected : num_rejected + emitted] = path[b, :emitted]
        block = table[(p + emitted - 1) // block_size]
        for node in order[: num_rejected + emitted]:
            cell, row = answer_count[block] % kept, first_row[b] + node
            entry, at = answers[block, cell], p
            above = node
            for i in range(CONTEXT):
                if above != EMPTY:
                    entry[i] = tree_tokens[b, above]
                    above = parents[b, above]
                else:
                    at -= 1
                    entry[i] = EMPTY
                    if at >= 0:
                        page = table[at // block_size]
                        entry[i] = text_tokens[page, at % block_size]
            entry[CONTEXT:] = tokens[row]
            answer_logprobs[block, cell] = logprobs[row]
            answer_count[block] += 1


def keep_answers(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    verdict: Verdict,
    answers: Answers,
) -> None:
    """`core.answers.keep_answers`."""
    if not pages.answers.shape[1]:
        return
    text, _, _, _, *kept = page_arrays(pages)
    _keep_answers_kernel(
        text,
        *kept,
        array(batch.block_table, torch.int32),
        array(batch.position, torch.int32),
        array(tree.tokens, torch.int32),
        array(tree.parents, torch.int32),
        array(tree.kinds, torch.int32),
        array(tree.num_nodes, torch.int32),
        array(verdict.path, torch.int32),
        array(verdict.num_emitted, torch.int32),
        array(answers.tokens, torch.int32),
        array(answers.logprobs, torch.float32),
        array(answers.first_row, torch.int32),
        MAX_REJECTED,  # a constant would be in Numba's cache
    )


@kernel
def _likeliest_kernel(
    logits,  # [n, V] float32
    tokens,  # [n, R] int32 out
    logprobs,  # [n, R] float32 out
    lanes,
):
    vocab_size, group = logits.shape[1], 32
    best = np.empty(lanes, np.float32)
    best_of_group = np.empty(lanes // group, np.float32)
    for row in range(logits.shape[0]):
        of_row = logits[row]
        best[:] = -np.inf
        for first in range(0, vocab_size, lanes):
            chunk = of_row[first : first + lanes]
            for lane in range(chunk.shape[0]):
                best[lane] = max(best[lane], chunk[lane])
        for i in range(best_of_group.shape[0]):
            best_of_group[i] = best[i * group : (i + 1) * group].max()
        top, total = best_of_group.max(), 0.0
        for lane in range(lanes):
            total += math.exp(best[lane] - top)
        log_total = top + math.log(total)
        for i in range(tokens.shape[1]):
            at = best_of_group.argmax()
            lanes_of_it = best[at * group : (at + 1) * group]
            place = lanes_of_it.argmax()
            logit, token = lanes_of_it[place], at * group + place
            tokens[row, i], logprobs[row, i] = EMPTY, 0
            if logit == -np.inf:
                continue
            while of_row[token] != logit:
                token += lanes
            tokens[row, i], logprobs[row, i] = token, logit - log_total
            lanes_of_it[place] = -np.inf
            best_of_group[at] = lanes_of_it.max()


def likeliest_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`core.answers.likeliest_tokens`."""
    n = len(logits)
    tokens = np.empty((n, NUM_ANSWERS), np.int32)
    logprobs = np.empty((n, NUM_ANSWERS), np.float32)
    _likeliest_kernel(array(logits.float(), torch.float32), tokens, logprobs, LANES)
    return torch.from_numpy(tokens), torch.from_numpy(logprobs)
