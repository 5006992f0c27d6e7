# SPDX-License-Identifier: Apache-2.0
"""Look up the pool and build the draft tree, a request at a time.

The same results as `core.pool.lookup`, `core.bigrams.complete`,
`core.window.read_window` and `core.tree.build_tree`, in one call and without a copy
of the history: a scan of the pages from the newest entry to the oldest.
"""

import math

import numpy as np
import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.bigrams import Draws
from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.core.pool import BIGRAM, ENTRIES_PER_CANDIDATE, MAX_CONTEXT
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.core.window import SEED_STRIDE
from vllm_lookahead.cpu_kernels.arrays import (
    array,
    batch_arrays,
    draws_arrays,
    page_arrays,
)
from vllm_lookahead.cpu_kernels.jit import kernel

NO_BIGRAMS = np.empty((0, 0), np.int32)


@kernel
def _agreement(tokens, table, block, offset, suffix):
    """Tokens before the one at (block, offset) that agree with the suffix."""
    context = 0
    while context < suffix.shape[0]:
        offset -= 1
        if offset < 0:
            block -= 1
            offset = tokens.shape[1] - 1
            if block < 0:
                break
        if tokens[table[block], offset] != suffix[context]:
            break
        context += 1
    return context


@kernel
def _find_entries(
    tokens,  # [num_blocks, block_size]
    ring,  # [num_blocks, ring_size, N+1]
    ring_count,  # [num_blocks]
    table,  # [max_blocks]
    position,
    root,
    found,  # [MAX_CONTEXT + 1, count] out, entries by agreement, newest first
    num_found,  # [MAX_CONTEXT + 1] out
):
    """Every pool entry whose key is the root, as far as there is room.

    Entry e >= 0 has its key at history position e; entry e < 0 is number -1 - e
    of the rings of the request's blocks, laid end to end.
    """
    block_size, ring_size = tokens.shape[1], ring.shape[1]
    max_context, count = found.shape[0] - 1, found.shape[1]
    suffix = np.empty(max_context, np.int32)  # newest first
    for i in range(max_context):
        at = position - 1 - i
        suffix[i] = tokens[table[at // block_size], at % block_size] if at >= 0 else -1
        if suffix[i] == EMPTY:
            suffix[i] = EMPTY - 1  # agrees with nothing

    num_found[:] = 0
    for block in range((position - 1) // block_size, -1, -1):
        page, first = table[block], block * block_size
        for offset in range(min(block_size, position - first) - 1, -1, -1):
            if tokens[page, offset] == root:
                context = _agreement(tokens, table, block, offset, suffix)
                if num_found[context] < count:
                    found[context, num_found[context]] = first + offset
                    num_found[context] += 1
        cell = ring_count[page] % ring_size if ring_size > 0 else 0
        for _ in range(min(ring_count[page], ring_size)):
            cell = cell - 1 if cell > 0 else ring_size - 1
            if ring[page, cell, 1] == root:
                context = 1 if ring[page, cell, 0] == suffix[0] else 0
                if num_found[context] < count:
                    found[context, num_found[context]] = -1 - block * ring_size - cell
                    num_found[context] += 1
        if num_found[max_context] == count:  # older ones rank below
            break


@kernel
def _read_chain(tokens, ring, table, position, root, entry, chain):
    """The values of an entry: fills `chain`, EMPTY beyond the end."""
    block_size, ring_size = tokens.shape[1], ring.shape[1]
    chain[:] = EMPTY
    for k in range(chain.shape[0]):
        if entry >= 0:
            at = entry + 1 + k
            if at > position:
                break
            if at == position:
                token = root
            else:
                token = tokens[table[at // block_size], at % block_size]
        else:
            number = -1 - entry
            token = ring[table[number // ring_size], number % ring_size, 2 + k]
        if token == EMPTY:
            break
        chain[k] = token


@kernel
def _is_prefix(chain, other):
    for k in range(chain.shape[0]):
        if chain[k] == EMPTY:
            break
        if chain[k] != other[k]:
            return False
    return True


@kernel
def _lookup(
    tokens,
    ring,
    table,
    position,
    root,
    wanted,
    found,  # [MAX_CONTEXT + 1, count]
    num_found,  # [MAX_CONTEXT + 1]
    chains,  # [G, N_r - 1] out, best first
    contexts,  # [G] out
):
    """The best distinct continuations of the root; returns how many."""
    num_chains, looked_at = 0, 0
    for context in range(found.shape[0] - 1, -1, -1):
        for i in range(num_found[context]):
            if num_chains == wanted or looked_at == found.shape[1]:
                return num_chains
            looked_at += 1
            chain = chains[num_chains]
            _read_chain(tokens, ring, table, position, root, found[context, i], chain)
            is_new = chain[0] != EMPTY
            for j in range(num_chains):
                if _is_prefix(chain, chains[j]):
                    is_new = False
                    break
            if is_new:
                contexts[num_chains] = context
                num_chains += 1
    return num_chains


@kernel
def _splitmix64(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _gumbel_noise(seed, token):
    """`core.bigrams.gumbel_noise`."""
    step = np.uint64(token + 1) * np.uint64(0x9E3779B97F4A7C15)
    bits = _splitmix64(_splitmix64(np.uint64(seed)) + step) >> np.uint64(11)
    return -math.log(-math.log((np.float64(bits) + 0.5) * 2.0**-53))


@kernel
def _rank(
    bigrams,  # [R] of a token
    logits,  # [R]
    temperature,
    seed,
    order,  # [R] out, columns of `bigrams`, the best first
    scores,  # [R] scratch
):
    for i in range(bigrams.shape[0]):
        noise = _gumbel_noise(seed, bigrams[i])
        score = np.float64(logits[i]) / np.float64(temperature) + noise
        at = i  # insertion: equal scores keep their order
        while at > 0 and scores[at - 1] < score:
            scores[at], order[at] = scores[at - 1], order[at - 1]
            at -= 1
        scores[at], order[at] = score, i


@kernel
def _complete(
    bigrams,  # [V, R]
    logits,  # [V, R], or empty as the one below
    seeds,  # [N-1]
    temperature,  # 0: without noise
    root,
    wanted,
    chain_length,  # [NUM_ORIGINS, G]
    chains,  # [G, N_r - 1] in and out
    contexts,  # [G] in and out
    num_chains,
):
    """Chains of the model's bigrams, and ends for the others; returns how many."""
    vocab_size, successors = bigrams.shape
    order, scores = np.arange(successors), np.empty(successors, np.float64)
    num_found = num_chains
    if vocab_size > 0:
        num_chains = min(wanted, num_found + successors)
    for i in range(num_chains):
        if i >= num_found:
            chains[i] = EMPTY
            contexts[i] = BIGRAM
        last, column = root, max(i - num_found, 0)
        for k in range(min(chains.shape[1], chain_length[contexts[i], i])):
            if chains[i, k] == EMPTY and 0 <= last < vocab_size:
                if temperature > 0:
                    _rank(
                        bigrams[last], logits[last], temperature, seeds[k],
                        order, scores,
                    )  # fmt: skip
                chains[i, k] = bigrams[last, order[column]]
            last, column = chains[i, k], 0
    return num_chains


@kernel
def _add_candidates(
    chains,  # [G, N_r - 1]
    contexts,  # [G]
    num_chains,
    chain_length,  # [NUM_ORIGINS, G]
    max_nodes,
    tokens,  # [T] out, as are the rest
    parents,
    depths,
    kinds,
    origins,
):
    """Chains under the root, merged where prefixes agree; returns the next node."""
    max_chains, max_depth = chains.shape
    node_of = np.empty((num_chains, max_depth), np.int32)
    node = 1
    for i in range(num_chains):
        chain, context = chains[i], contexts[i]
        for k in range(chain_length[context, i], max_depth):
            chain[k] = EMPTY
        shared = 0  # longest prefix that an earlier chain has
        for j in range(i):
            k = 0
            while k < max_depth and chain[k] != EMPTY and chain[k] == chains[j, k]:
                node_of[i, k] = node_of[j, k]
                k += 1
            shared = max(shared, k)
        for k in range(shared, max_depth):
            if chain[k] == EMPTY:
                break
            if node >= max_nodes:
                return node
            tokens[node], kinds[node], depths[node] = chain[k], CANDIDATE, k + 1
            parents[node] = node_of[i, k - 1] if k > 0 else 0
            origins[node] = context * max_chains + i
            node_of[i, k] = node
            node += 1
    return node


@kernel
def _add_window(
    pages_tokens,  # [num_blocks, block_size]
    page_window,  # [N-1, W] the tail block's
    table,  # [max_blocks]
    position,
    seed_stride,
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
            at = (column * seed_stride + row) % max(position, 1)
            token = pages_tokens[table[at // block_size], at % block_size]
            if token == EMPTY:
                token = tokens[0]
        above = cell - 1 if row == 0 else cell - width
        tokens[node], kinds[node], depths[node] = token, WINDOW, row + column
        parents[node] = before + above if above > 0 else 0
        node += 1
    return node


@kernel
def _propose_kernel(
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
    chain_length,  # [NUM_ORIGINS, G] int32
    bigrams,  # [V, R] int32
    seeds,  # [B, N-1] int64, or empty as the two below
    temperature,  # [B] float32
    logits,  # [V, R] float32
    entries_per_candidate,
    seed_stride,
    columns,  # [5, B, T] int32 out: tokens, parents, depths, kinds, origins
    num_nodes,  # [B] int32 out
):
    levels, max_chains = MAX_CONTEXT + 1, chain_length.shape[1]
    no_seeds = np.empty(0, np.int64)
    found = np.empty((levels, max_chains * entries_per_candidate), np.int64)
    num_found = np.empty(levels, np.int64)
    contexts = np.empty(max_chains, np.int64)
    for b in range(position.shape[0]):
        table, p, rows = block_table[b], position[b], ngram_size[b] - 1
        chains = np.empty((max_chains, rows), np.int32)
        num_chains = 0
        wanted = min(verification_set_size[b], max_chains)
        if wanted > 0:
            _find_entries(tokens, ring, ring_count, table, p, root[b], found, num_found)
            num_chains = _lookup(
                tokens, ring, table, p, root[b], wanted, found, num_found,
                chains, contexts,
            )  # fmt: skip
            has_draws = temperature.shape[0] > 0
            num_chains = _complete(
                bigrams, logits, seeds[b] if has_draws else no_seeds,
                temperature[b] if has_draws else np.float32(0),
                root[b], wanted, chain_length, chains, contexts, num_chains,
            )  # fmt: skip

        out_tokens, parents, depths = columns[0, b], columns[1, b], columns[2, b]
        kinds, origins = columns[3, b], columns[4, b]
        for i in range(out_tokens.shape[0]):
            out_tokens[i] = parents[i] = origins[i] = EMPTY
            depths[i], kinds[i] = 0, ROOT
        out_tokens[0] = root[b]
        node = _add_candidates(
            chains, contexts, num_chains, chain_length, max_nodes[b],
            out_tokens, parents, depths, kinds, origins,
        )  # fmt: skip
        if window_size[b] > 0:
            tail = table[(p - 1) // tokens.shape[1]]
            node = _add_window(
                tokens, window[tail], table, p, seed_stride, window_size[b], rows,
                node, max_nodes[b], out_tokens, parents, depths, kinds,
            )  # fmt: skip
        num_nodes[b] = node


def propose(
    pages: BlockPages,
    batch: RequestBatch,
    chain_length: torch.Tensor,
    bigrams: torch.Tensor | None = None,
    draws: Draws | None = None,
) -> DraftTree:
    """`TorchOps.propose` in one pass."""
    num_requests = batch.position.shape[0]
    max_chains = chain_length.shape[1]
    _, num_rows, num_columns = pages.window.shape
    size = 1 + max_chains * num_rows + max(0, num_columns * num_rows - 1)
    columns = np.empty((5, num_requests, size), np.int32)
    num_nodes = np.empty(num_requests, np.int32)
    _propose_kernel(
        *page_arrays(pages),
        *batch_arrays(batch),
        array(chain_length, torch.int32),
        NO_BIGRAMS if bigrams is None else array(bigrams, torch.int32),
        *draws_arrays(draws),
        ENTRIES_PER_CANDIDATE,
        SEED_STRIDE,
        columns,
        num_nodes,
    )
    return DraftTree(*map(torch.from_numpy, (*columns, num_nodes)))
