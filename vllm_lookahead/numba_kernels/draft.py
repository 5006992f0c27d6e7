# SPDX-License-Identifier: Apache-2.0
"""`core.draft.best_first.grow`, a request at a time and in one call."""

import math

import numpy as np
import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.best_first import (
    MAX_AGREEMENT,
    MAX_SEEN,
    WEIGHTS,
    Hints,
)
from vllm_lookahead.core.draft.window import SEED_STRIDE
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.numba_kernels.arrays import (
    array,
    batch_arrays,
    hints_arrays,
    page_arrays,
)
from vllm_lookahead.numba_kernels.jit import kernel

# An argument of the kernel: a change would not reach one in Numba's cache.
_WEIGHTS = np.array(list(WEIGHTS.values()))
# Agrees with no token, not with an empty cell either.
_NOTHING = EMPTY - 1


@kernel
def _splitmix64(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _gumbel_noise(seed, token):
    """`core.draft.noise.gumbel_noise`."""
    step = np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15)
    bits = _splitmix64(_splitmix64(np.uint64(seed)) + step) >> np.uint64(11)
    return -math.log(-math.log((np.float64(bits) + 0.5) * 2.0**-53))


@kernel
def _token_at(tokens, table, position, root, at):
    """Token at a position of the history, of which the root is the last."""
    if at < 0:
        return EMPTY
    if at == position:
        return root
    return tokens[table[at // tokens.shape[1]], at % tokens.shape[1]]


@kernel
def _count_in(seen, num_seen, token, agreed):
    """One more entry that goes on with this token; returns how many there are.

    seen: [3, MAX_SEEN] tokens, furthest agreement, count.
    """
    for i in range(num_seen):
        if seen[0, i] == token:
            seen[1, i] = max(seen[1, i], agreed)
            seen[2, i] += 1
            return num_seen
    at = num_seen
    if num_seen == seen.shape[1]:
        at = 0
        for i in range(1, num_seen):
            if seen[1, i] <= seen[1, at]:
                at = i
        if agreed <= seen[1, at]:
            return num_seen
    seen[0, at], seen[1, at], seen[2, at] = token, agreed, 1
    return max(num_seen, at + 1)


@kernel
def _find_seen(
    tokens,  # [num_blocks, block_size]
    ring,  # [num_blocks, ring_size, N+1]
    ring_count,  # [num_blocks]
    table,  # [max_blocks]
    position,
    root,
    last,  # token that is looked for
    suffix,  # [MAX_AGREEMENT] tokens before it, the nearest first
    seen,  # [3, MAX_SEEN] out
):
    """What followed a token in the request's pages, the newest first.

    Returns how many distinct tokens, and the one of the latest entry that agrees
    furthest.
    """
    block_size, ring_size, width = tokens.shape[1], ring.shape[1], ring.shape[2]
    num_seen, latest, most_agreed = 0, EMPTY, -1
    for block in range((position - 1) // block_size, -1, -1):
        page, first = table[block], block * block_size
        length = min(block_size, position - first)
        num_equal = 0  # compared many at a time; most blocks have none
        for offset in range(length):
            num_equal += tokens[page, offset] == last
        offset = length
        while num_equal > 0:
            offset -= 1
            if tokens[page, offset] != last:
                continue
            num_equal -= 1
            at, agreed = first + offset, 0
            following = _token_at(tokens, table, position, root, at + 1)
            if following == EMPTY:
                continue
            while agreed < suffix.shape[0]:
                before = _token_at(tokens, table, position, root, at - 1 - agreed)
                if before != suffix[agreed]:
                    break
                agreed += 1
            if agreed > most_agreed:
                latest, most_agreed = following, agreed
            num_seen = _count_in(seen, num_seen, following, agreed)
    if ring_size == 0:
        return num_seen, latest
    for block in range((position - 1) // block_size, -1, -1):
        page = table[block]
        cell = ring_count[page] % ring_size
        for _ in range(min(ring_count[page], ring_size)):
            cell = cell - 1 if cell > 0 else ring_size - 1
            for at in range(1, width - 1):
                following = ring[page, cell, at + 1]
                if ring[page, cell, at] != last or following == EMPTY:
                    continue
                agreed = 0
                while agreed < min(suffix.shape[0], at):
                    if ring[page, cell, at - 1 - agreed] != suffix[agreed]:
                        break
                    agreed += 1
                if agreed > most_agreed:
                    latest, most_agreed = following, agreed
                num_seen = _count_in(seen, num_seen, following, agreed)
    return num_seen, latest


@kernel
def _rejected_node(tokens, depths, depth, token):
    """Index of the rejected node at a depth, of this token at best; or EMPTY."""
    found = EMPTY
    for i in range(tokens.shape[0]):
        if depths[i] == depth and tokens[i] != EMPTY:
            if tokens[i] == token:
                return i
            if found == EMPTY:
                found = i
    return found


@kernel
def _logit_after(bigrams, logits, of, token):
    """Logit of a token after another; if it is not listed, of the last one that is."""
    least = 0.0
    if 0 <= of < bigrams.shape[0]:
        for i in range(bigrams.shape[1]):
            if bigrams[of, i] != EMPTY:
                if bigrams[of, i] == token:
                    return np.float64(logits[of, i])
                least = min(least, np.float64(logits[of, i]))
    return least


@kernel
def _estimate(
    last,
    seen,  # [3, MAX_SEEN]
    num_seen,
    latest,
    weights,  # [8] as in WEIGHTS
    bigrams,  # [V, R]
    logits,  # [V, R]
    temperature,  # 0: without noise
    seed,
    wrong,  # token of a rejected node, and its answer
    answer,  # [V] or empty: integers, the upper bits of float32
    answer_shift,
    tokens,  # [R + MAX_SEEN] out
    chances,  # [R + MAX_SEEN] out, their log-probabilities
):
    """Tokens that may follow; returns how many."""
    of_bigram, of_unlisted, of_agreement, of_latest = weights[:4]
    of_count, of_rejected, of_noise, of_other = weights[4:]
    count, least = 0, 0.0
    if 0 <= last < bigrams.shape[0]:
        for i in range(bigrams.shape[1]):
            if bigrams[last, i] != EMPTY:
                logit = np.float64(logits[last, i])
                tokens[count], chances[count] = bigrams[last, i], of_bigram * logit
                least = min(least, logit)
                count += 1
    unlisted = of_bigram * least + of_unlisted if count > 0 else 0.0
    num_listed = count
    for i in range(num_seen):
        at = 0
        while at < num_listed and tokens[at] != seen[0, i]:
            at += 1
        if at == num_listed:
            at = count
            tokens[at], chances[at] = seen[0, i], unlisted
            count += 1
        # In the reference's order, for equal sums.
        chances[at] += of_agreement * seen[1, i]
        if seen[0, i] == latest:
            chances[at] += of_latest
        chances[at] += of_count * math.log(1 + 2 * seen[2, i])
    surprise, most = np.zeros(count), -np.inf
    for i in range(count):
        if tokens[i] < answer.shape[0]:
            bits = np.uint32(answer[tokens[i]]) << np.uint32(answer_shift)
            said = np.float64(np.uint32(bits).view(np.float32))
            surprise[i] = said - _logit_after(bigrams, logits, wrong, tokens[i])
        most = max(most, surprise[i])
    top = -np.inf
    for i in range(count):
        chances[i] += of_rejected * (surprise[i] - most)
        if temperature > 0:
            noise = _gumbel_noise(seed, tokens[i])
            chances[i] += of_noise * (np.float64(temperature) * noise)
        top = max(top, chances[i])
    total = 0.0
    for i in range(count):
        total += math.exp(chances[i] - top)
    total = math.exp(of_other * np.float64(temperature) - top) + total
    for i in range(count):
        chances[i] = chances[i] - top - math.log(total)
    return count


@kernel
def _suffix_of(node, nodes, parents, tokens, table, position, root, suffix):
    """The tokens before a node of the tree, the nearest first."""
    at = position
    for i in range(suffix.shape[0]):
        if node > 0:
            node = parents[node]
            suffix[i] = nodes[node]
        else:
            at -= 1
            suffix[i] = _token_at(tokens, table, position, root, at)
        if suffix[i] == EMPTY:
            suffix[i] = _NOTHING


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
def _grow_kernel(
    tokens,  # [num_blocks, block_size] int32
    ring,  # [num_blocks, ring_size, N+1] int32
    ring_count,  # [num_blocks] int32
    window,  # [num_blocks, N-1, W] int32
    block_table,  # [B, max_blocks] int32
    position,  # [B] int32
    root,  # [B] int32
    window_size,  # [B] int32
    ngram_size,  # [B] int32
    verification_set_size,  # [B] int32
    max_nodes,  # [B] int32
    bigrams,  # [V, R] int32
    logits,  # [V, R] float32
    temperature,  # [B] float32
    seeds,  # [B, N-1] int64
    rejected_tokens,  # [B, S] int32
    rejected_depths,  # [B, S] int32
    rejected_rows,  # [B, S] int64
    answers,  # [n, V] uint16 or uint32: the upper bits of float32
    answer_shift,
    weights,  # [8] float64
    least,
    columns,  # [4, B, T] int32 out: tokens, parents, depths, kinds
    num_nodes,  # [B] int32 out
    expected,  # [B] float64 out
):
    size, most_next = columns.shape[2], bigrams.shape[1] + MAX_SEEN
    suffix, seen = np.empty(MAX_AGREEMENT, np.int32), np.empty((3, MAX_SEEN), np.int64)
    next_tokens, next_chances = np.empty(most_next, np.int32), np.empty(most_next)
    chances, is_parent = np.empty(size), np.empty(size, np.bool_)
    waiting = np.empty((2, size * most_next), np.int32)  # token, parent
    waiting_chances = np.empty(size * most_next)
    no_answer = np.empty(0, answers.dtype)
    log_least = math.log(least)
    for b in range(position.shape[0]):
        table, p, depth = block_table[b], position[b], ngram_size[b] - 1
        out_tokens, parents, depths = columns[0, b], columns[1, b], columns[2, b]
        kinds = columns[3, b]
        columns[:, b] = EMPTY
        depths[:], kinds[:], is_parent[:] = 0, ROOT, False
        out_tokens[0], chances[0], is_parent[0] = root[b], 0.0, True
        leaves = verification_set_size[b]
        most = min(max_nodes[b], 1 + leaves * depth)
        node, num_leaves, num_waiting = 1, 0, 0
        expected[b] = 0.0
        while node < most:
            parent = node - 1
            if depths[parent] < depth:
                last = out_tokens[parent]
                _suffix_of(
                    parent, out_tokens, parents, tokens, table, p, root[b], suffix
                )
                num_seen, latest = _find_seen(
                    tokens, ring, ring_count, table, p, root[b], last, suffix, seen
                )
                at = _rejected_node(
                    rejected_tokens[b], rejected_depths[b], depths[parent], last
                )
                wrong, answer = EMPTY, no_answer
                if at != EMPTY:
                    wrong = rejected_tokens[b, at]
                    answer = answers[rejected_rows[b, at]]
                count = _estimate(
                    last, seen, num_seen, latest, weights, bigrams, logits,
                    temperature[b], seeds[b, depths[parent]], wrong, answer,
                    answer_shift, next_tokens, next_chances,
                )  # fmt: skip
                for i in range(count):
                    chance = chances[parent] + next_chances[i]
                    if chance >= log_least:
                        waiting[0, num_waiting] = next_tokens[i]
                        waiting[1, num_waiting] = parent
                        waiting_chances[num_waiting] = chance
                        num_waiting += 1
            # A child of a leaf is the leaf that its parent was.
            best, best_chance = -1, -np.inf
            for i in range(num_waiting):
                may_grow = num_leaves < leaves or not is_parent[waiting[1, i]]
                if may_grow and waiting_chances[i] > best_chance:
                    best, best_chance = i, waiting_chances[i]
            if best < 0:
                break
            parent = waiting[1, best]
            num_leaves += is_parent[parent]
            is_parent[parent] = True
            out_tokens[node], chances[node] = waiting[0, best], best_chance
            parents[node], depths[node] = parent, depths[parent] + 1
            kinds[node] = CANDIDATE
            expected[b] += math.exp(best_chance)
            waiting_chances[best] = -np.inf
            node += 1
        if window_size[b] > 0:
            tail = table[(p - 1) // tokens.shape[1]]
            node = _add_window(
                tokens, window[tail], table, p, window_size[b], depth, node,
                max_nodes[b], out_tokens, parents, depths, kinds,
            )  # fmt: skip
        num_nodes[b] = node


def grow(
    pages: BlockPages, batch: RequestBatch, hints: Hints, least: float
) -> tuple[DraftTree, torch.Tensor]:
    """`core.draft.best_first.grow`."""
    num_requests, (_, num_rows, num_columns) = len(batch.root), pages.window.shape
    leaves = array(batch.verification_set_size, torch.int32)
    most = int(leaves.max()) * num_rows if num_requests else 0
    size = 1 + most + max(0, num_columns * num_rows - 1)
    columns = np.empty((4, num_requests, size), np.int32)
    num_nodes = np.empty(num_requests, np.int32)
    expected = np.empty(num_requests)
    _grow_kernel(
        *page_arrays(pages),
        *batch_arrays(batch),
        *hints_arrays(hints),
        _WEIGHTS,
        least,
        columns,
        num_nodes,
        expected,
    )
    tree = DraftTree(*map(torch.from_numpy, (*columns, num_nodes)))
    return tree, torch.from_numpy(expected)
