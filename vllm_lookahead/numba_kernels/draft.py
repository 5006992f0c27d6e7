# SPDX-License-Identifier: Apache-2.0
"""`core.draft.grow.draft` and the files of that folder, a request at a time.

All of it is here: a kernel in Numba's cache must not call another file's, whose changes
would go unnoticed.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import FLOOR, WEIGHTS, Hints
from vllm_lookahead.core.draft.grow import BEAM
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.draft.window import SEED_STRIDE
from vllm_lookahead.core.pages import (
    CONTEXT,
    EMPTY,
    NUM_ANSWERS,
    BlockPages,
    num_recent_blocks,
)
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.numba_kernels.arrays import array, batch_arrays, page_arrays
from vllm_lookahead.numba_kernels.jit import kernel
from vllm_lookahead.numba_kernels.tables import Tables
from vllm_lookahead.params import LookaheadParams


@kernel
def _splitmix64(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _noise(seed, token):
    """`core.draft.noise.cpu_noise`."""
    step = np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15)
    bits = _splitmix64(_splitmix64(np.uint64(seed)) + step) >> np.uint64(11)
    return -math.log(-math.log((np.float64(bits) + 0.5) * 2.0**-53))


@kernel
def _hash(h, token):
    """One more token of a context: `core.draft.index.cell_of`."""
    mask = np.uint64(0xFFFFFFFF)
    h = ((h ^ np.uint64(token)) + np.uint64(0x9E3779B9)) * np.uint64(0x85EBCA6B) & mask
    return h ^ (h >> np.uint64(15))


@kernel
def _file(cells, context, place):
    """`Index.file`: a context, nearest token first and EMPTY behind its end."""
    h, last = np.uint64(0), np.uint64(cells.shape[0] - 1)
    for i in range(CONTEXT):
        if context[i] == EMPTY:
            break
        h = _hash(h, context[i])
        cells[h & last] = place


@kernel
def _text_context(tokens, ring, table, root, position, place, context):
    """The context at a place of the text, and what followed it.

    A place is a position of the history or, below EMPTY, a token of an n-gram.
    """
    block_size, ring_size, width = tokens.shape[1], ring.shape[1], ring.shape[2]
    context[:] = EMPTY
    if place >= 0:
        for i in range(min(CONTEXT, place + 1)):
            at = place - i
            context[i] = tokens[table[at // block_size], at % block_size]
        at = place + 1
        if at == position:
            return root
        return tokens[table[at // block_size], at % block_size]
    number = -2 - place
    cell, at = number // width, number % width
    gram = ring[table[cell // ring_size], cell % ring_size]
    for i in range(min(CONTEXT, at + 1)):
        context[i] = gram[at - i]
    return gram[at + 1]


@kernel
def _file_text(
    tokens, ring, ring_count, table, position, root, first_block, context, start, cells
):
    """`core.draft.index.text_index`, of places from `start` on."""
    block_size, ring_size, width = tokens.shape[1], ring.shape[1], ring.shape[2]
    if start == 0:
        cells[:] = EMPTY
        for logical in range(first_block, (position + block_size - 1) // block_size):
            count = ring_count[table[logical]]
            for order in range(max(0, count - ring_size), count):
                cell = logical * ring_size + order % ring_size
                for at in range(1, width - 1):
                    place = -2 - (cell * width + at)
                    following = _text_context(
                        tokens, ring, table, root, position, place, context
                    )
                    if following != EMPTY:
                        _file(cells, context, place)
    context[:] = EMPTY
    for i in range(min(CONTEXT - 1, start)):
        at = start - 1 - i
        context[i] = tokens[table[at // block_size], at % block_size]
    for first in range(start - start % block_size, position, block_size):
        page = tokens[table[first // block_size]]
        length = min(block_size, position - first)
        following = page[max(0, start - first)]
        for offset in range(max(0, start - first), length):
            for i in range(CONTEXT - 1, 0, -1):
                context[i] = context[i - 1]
            context[0] = following
            at = first + offset
            if at + 1 == position:
                following = root
            elif offset + 1 < length:
                following = page[offset + 1]
            else:
                following = tokens[table[(at + 1) // block_size], 0]
            if following != EMPTY:
                _file(cells, context, at)


@kernel
def _file_answers(answers, answer_count, table, first, end, start, cells):
    """`core.draft.index.answer_index`, of the block `first` from its answer `start` on.

    A place is A times the logical block, and a cell.
    """
    kept = answers.shape[1]
    for logical in range(first, end):
        page = table[logical]
        count = answer_count[page]
        for order in range(max(start, count - kept), count):
            cell = order % kept
            _file(cells, answers[page, cell], logical * kept + cell)
        start = 0


@kernel
def _agrees(one, other, length):
    agreeing = 0
    while agreeing < length and one[agreeing] == other[agreeing]:
        agreeing += 1
    return agreeing == length


@kernel
def _add(tokens, odds, count, token, more):
    """More odds of a token; returns how many there are."""
    for i in range(count):
        if tokens[i] == token:
            odds[i] += more
            return count
    tokens[count], odds[count] = token, more
    return count + 1


@kernel
def _estimate(
    text_tokens,  # [num_blocks, block_size]
    ring,  # [num_blocks, ring_size, N+1]
    answers,  # [num_blocks, A, CONTEXT + R]
    answer_logprobs,  # [num_blocks, A, R]
    table,  # [max_blocks]
    position,
    root,
    text_cells,
    answer_cells,
    bigrams,  # [V, R]
    bigram_logprobs,  # [V, R]
    temperature,  # 0: without noise
    seed,
    weights,  # [10] as WEIGHTS
    floor,
    context,  # [CONTEXT]
    filed,  # [CONTEXT] scratch
    tokens,  # [1 + NUM_ANSWERS + R] out
    scores,  # [1 + NUM_ANSWERS + R] out: odds at first, then log-probabilities
):
    """`core.draft.estimate.Estimator`; returns how many tokens may follow."""
    hashes, known = np.zeros(CONTEXT, np.uint64), 0
    h = np.uint64(0)
    while known < CONTEXT and context[known] != EMPTY:
        h = _hash(h, context[known])
        hashes[known] = h
        known += 1
    count, last = 0, np.uint64(text_cells.shape[0] - 1)
    for length in range(known, 0, -1):
        place = text_cells[hashes[length - 1] & last]
        if place == EMPTY:
            continue
        following = _text_context(
            text_tokens, ring, table, root, position, place, filed
        )
        # The page may have changed since it was filed.
        if following != EMPTY and _agrees(context, filed, length):
            odds = math.exp(weights[length - 1])
            count = _add(tokens, scores, count, following, odds)
            break
    last, kept = np.uint64(answer_cells.shape[0] - 1), answers.shape[1]
    for length in range(known, 0, -1):
        place = answer_cells[hashes[length - 1] & last]
        if place == EMPTY:
            continue
        page, cell = table[place // kept], place % kept
        if _agrees(context, answers[page, cell], length):
            weight = weights[2 + length]
            for i in range(NUM_ANSWERS):
                token = answers[page, cell, CONTEXT + i]
                if token != EMPTY:
                    said = np.float64(answer_logprobs[page, cell, i]) - floor
                    odds = math.exp(weight * max(said, 0.0))
                    count = _add(tokens, scores, count, token, odds)
            break
    if 0 <= context[0] < bigrams.shape[0]:
        for i in range(bigrams.shape[1]):
            token = bigrams[context[0], i]
            if token != EMPTY:
                said = np.float64(bigram_logprobs[context[0], i]) - floor
                odds = math.exp(weights[6] * max(said, 0.0))
                count = _add(tokens, scores, count, token, odds)
    of_all = np.float64(temperature)
    other = weights[8] + weights[9] * of_all
    top = other
    for i in range(count):
        scores[i] = math.log(scores[i])
        if temperature > 0:
            scores[i] += weights[7] * of_all * _noise(seed, tokens[i])
        top = max(top, scores[i])
    total = 0.0
    for i in range(count):
        total += math.exp(scores[i] - top)
    log_total = math.log(math.exp(other - top) + total)
    for i in range(count):
        scores[i] = scores[i] - top - log_total
    return count


@kernel
def _insert(chances, tokens, parents, first, count, most, chance, token, parent):
    """Into a list in falling order, of which the best are kept; returns its length."""
    if count == most:
        if count == 0 or chance <= chances[first + count - 1]:
            return count
        count -= 1
    at = first + count
    while at > first and chances[at - 1] < chance:
        chances[at], tokens[at] = chances[at - 1], tokens[at - 1]
        parents[at] = parents[at - 1]
        at -= 1
    chances[at], tokens[at], parents[at] = chance, token, parent
    return count + 1


@kernel
def _add_window(
    pages_tokens,  # [num_blocks, block_size]
    page_window,  # [N-1, W] the tail block's
    table,  # [max_blocks]
    position,
    width,
    rows,
    node,  # next free one
    max_nodes,
    tokens,  # [T] out, as are the rest
    parents,
    depths,
    kinds,
):
    """The window behind the candidates; returns the next node."""
    block_size = pages_tokens.shape[1]
    num_cells = width * rows
    if node + num_cells - 1 > max_nodes:
        return node
    before = node - 1  # cell c is node before + c; cell 0 is the root
    for cell in range(1, num_cells):
        row, column = cell // width, cell % width
        token = page_window[row, column]
        if token == EMPTY:  # seed it
            at = (column * SEED_STRIDE + row) % max(position, 1)
            token = pages_tokens[table[at // block_size], at % block_size]
            if token == EMPTY:
                token = tokens[0]
        above = cell - 1 if row == 0 else cell - width
        tokens[node], kinds[node], depths[node] = token, WINDOW, row + column
        parents[node] = before + above if above > 0 else 0
        node += 1
    return node


@kernel
def _draft_kernel(
    tokens,  # [num_blocks, block_size] int32
    ring,  # [num_blocks, ring_size, N+1] int32
    ring_count,  # [num_blocks] int32
    window,  # [num_blocks, N-1, W] int32
    answers,  # [num_blocks, A, CONTEXT + R] int32
    answer_logprobs,  # [num_blocks, A, R] float32
    answer_count,  # [num_blocks] int32
    block_table,  # [B, max_blocks] int32
    position,  # [B] int32
    root,  # [B] int32
    window_size,  # [B] int32
    ngram_size,  # [B] int32
    verification_set_size,  # [B] int32
    max_nodes,  # [B] int32
    bigrams,  # [V, R] int32
    bigram_logprobs,  # [V, R] float32
    temperature,  # [B] float32
    seeds,  # [B, N-1] int64
    weights,  # [10] float64
    most_candidates,  # G of the server
    floor,  # constants are arguments: a change would not reach a cached kernel
    beam,
    least,
    recent,  # blocks whose n-grams and answers are read
    text_table,  # [rows, cells] int32, what is filed; in and out, as the next two
    answer_table,  # [rows, cells] int32
    filed,  # [rows, 3] int64: tokens, last block and its answers that are filed
    rows,  # [B] int64, of the tables
    columns,  # [4, B, T] int32 out: tokens, parents, depths, kinds
    num_nodes,  # [B] int32 out
    chances,  # [B, T] float32 out
):
    size, most_next = columns.shape[2], 1 + NUM_ANSWERS + bigrams.shape[1]
    block_size = tokens.shape[1]
    next_tokens, next_chances = np.empty(most_next, np.int32), np.empty(most_next)
    # Of all nodes grown, level by level; the root first.
    grown_tokens, grown_parents = np.empty(size, np.int32), np.empty(size, np.int32)
    grown_depths, grown_chances = np.empty(size, np.int32), np.empty(size)
    contexts = np.empty((size, CONTEXT), np.int32)
    place_tokens = np.empty(CONTEXT, np.int32)
    place = np.empty(size, np.int32)
    log_least = math.log(least) if least > 0 else -np.inf
    for b in range(position.shape[0]):
        table, p, levels = block_table[b], position[b], ngram_size[b] - 1
        out_tokens, parents, depths = columns[0, b], columns[1, b], columns[2, b]
        kinds = columns[3, b]
        columns[:, b], chances[b] = EMPTY, 0.0
        depths[:], kinds[:] = 0, ROOT
        out_tokens[0] = root[b]
        most, node = min(verification_set_size[b], most_candidates), 1
        if most > 0 and max_nodes[b] > 1 and log_least < 0:
            end = (p + block_size - 1) // block_size
            first_block, known = max(0, end - recent), filed[rows[b]]
            text_cells, answer_cells = text_table[rows[b]], answer_table[rows[b]]
            if ring.shape[1] > 0 or known[0] > p:  # n-grams are older than any text
                known[0] = 0
            _file_text(
                tokens, ring, ring_count, table, p, root[b], first_block, place_tokens,
                known[0], text_cells,
            )  # fmt: skip
            first_new, start = first_block, 0
            if known[0] == 0:
                answer_cells[:] = EMPTY
            elif known[1] >= first_block:
                first_new, start = known[1], known[2]
            _file_answers(
                answers, answer_count, table, first_new, end, start, answer_cells
            )
            known[0], known[1] = p, end - 1
            known[2] = answer_count[table[end - 1]]
            contexts[0] = EMPTY
            contexts[0, 0] = root[b]
            for i in range(1, min(CONTEXT, p + 1)):
                at = p - i
                contexts[0, i] = tokens[table[at // block_size], at % block_size]
            grown_chances[0], grown_depths[0], grown_parents[0] = 0.0, 0, EMPTY
            first, count, num_grown = 0, 1, 1
            for level in range(levels):
                num_children = 0
                for parent in range(first, first + min(count, beam)):
                    num_next = _estimate(
                        tokens, ring, answers, answer_logprobs, table, p, root[b],
                        text_cells, answer_cells, bigrams, bigram_logprobs,
                        temperature[b], seeds[b, level], weights, floor,
                        contexts[parent], place_tokens, next_tokens, next_chances,
                    )  # fmt: skip
                    for i in range(num_next):
                        chance = grown_chances[parent] + next_chances[i]
                        if chance >= log_least:
                            num_children = _insert(
                                grown_chances, grown_tokens, grown_parents, num_grown,
                                num_children, most, chance, next_tokens[i], parent,
                            )  # fmt: skip
                first, count = num_grown, num_children
                for child in range(first, first + count):
                    parent = grown_parents[child]
                    grown_depths[child] = level + 1
                    contexts[child, 0] = grown_tokens[child]
                    contexts[child, 1:] = contexts[parent, :-1]
                num_grown += count
            order = np.argsort(-grown_chances[1:num_grown], kind="mergesort")
            place[0] = 0
            for i in range(min(len(order), max_nodes[b] - 1)):
                grown = 1 + order[i]
                place[grown] = node
                out_tokens[node], kinds[node] = grown_tokens[grown], CANDIDATE
                parents[node] = place[grown_parents[grown]]
                depths[node] = grown_depths[grown]
                chances[b, node] = math.exp(grown_chances[grown])
                node += 1
        if window_size[b] > 0:
            tail = table[max(p - 1, 0) // block_size]
            node = _add_window(
                tokens, window[tail], table, p, window_size[b], levels, node,
                max_nodes[b], out_tokens, parents, depths, kinds,
            )  # fmt: skip
        num_nodes[b] = node


def draft(
    pages: BlockPages,
    batch: RequestBatch,
    hints: Hints,
    max_candidates: int,
    weights: Mapping[str, float] = WEIGHTS,
    tables: Tables | None = None,
) -> tuple[DraftTree, torch.Tensor]:
    """`core.draft.grow.draft`, of the noise that vLLM's CPU sampler adds.

    Args:
        tables: of the requests; those of the step before, so that only what is new
            since then is filed. None files everything.

    Raises:
        ValueError: noise of another sampler.
    """
    if hints.noise is not cpu_noise:
        raise ValueError(f"noise is {hints.noise}; the kernel knows that of a CPU only")
    num_requests, (_, rows, width) = len(batch.root), pages.window.shape
    size = LookaheadParams(width, rows + 1, max_candidates).max_tree_size
    num_blocks = batch.block_table.shape[1]
    if tables is None:
        tables = Tables()
        tables.choose(range(num_requests), pages, num_blocks)
    columns = np.empty((4, num_requests, size), np.int32)
    num_nodes = np.empty(num_requests, np.int32)
    chances = np.empty((num_requests, size), np.float32)
    _draft_kernel(
        *page_arrays(pages),
        *batch_arrays(batch),
        array(hints.bigrams, torch.int32),
        array(hints.bigram_logprobs, torch.float32),
        array(hints.temperature, torch.float32),
        array(hints.seeds, torch.int64),
        np.array(list(weights.values())),
        max_candidates,
        FLOOR,
        BEAM,
        hints.least,
        num_recent_blocks(pages.block_size),
        tables.text,
        tables.answers,
        tables.filed,
        tables.rows,
        columns,
        num_nodes,
        chances,
    )  # fmt: skip
    tree = DraftTree(*map(torch.from_numpy, (*columns, num_nodes)))
    return tree, torch.from_numpy(chances)
