# SPDX-License-Identifier: Apache-2.0
"""Draft the trees: root, the likeliest candidates, window.

Reference: `core.draft.grow`, with `core.draft.estimate` and `core.draft.window`. One
launch behind that of `index`, one program per request. It grows level by level: all
that may follow the beam is one tile [BEAM, NEXT] of tokens with their cost, that is the
negative log of their chance. A node's rank is how many others are better, level by
level and then of all: nothing is sorted.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import FLOOR, Hints
from vllm_lookahead.core.draft.grow import BEAM
from vllm_lookahead.core.draft.index import num_answer_cells, num_cells
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.draft.window import SEED_STRIDE
from vllm_lookahead.core.pages import CONTEXT, NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree
from vllm_lookahead.triton_kernels.checks import (
    Checked,
    expect,
    expect_batch,
    expect_tree,
)
from vllm_lookahead.triton_kernels.index import (
    IndexTables,
    find_answer,
    find_text,
    hashes_of,
)
from vllm_lookahead.triton_kernels.jit import jit
from vllm_lookahead.triton_kernels.noise import gumbel_noise
from vllm_lookahead.triton_kernels.pages import NO_TOKEN, expect_pages, load_slot

KIND_ROOT = tl.constexpr(ROOT)
KIND_CANDIDATE = tl.constexpr(CANDIDATE)
KIND_WINDOW = tl.constexpr(WINDOW)
STRIDE = tl.constexpr(SEED_STRIDE)
NOTHING_SAID = tl.constexpr(FLOOR)  # as a log-probability
LENGTHS = tl.constexpr(triton.next_power_of_2(CONTEXT))
ANSWERED = tl.constexpr(NUM_ANSWERS)
BEHIND_CONTEXT = tl.constexpr(CONTEXT)
# A key behind every node's: of what is no node.
NOBODY = tl.constexpr(2**63 - 1)

_checked = Checked()


@dataclass
class DraftScratch:
    """What a program grows, level by level; node i of level l is G * l + i.

    Attributes:
        keys: [max_num_reqs, G(N-1)] int64, cost as bits << 32 | node: its order.
        tokens: [max_num_reqs, G(N-1)] int32.
        parents: [max_num_reqs, G(N-1)] int32, node, -1 for the root.
        places: [max_num_reqs, G(N-1)] int32, in the tree.
    """

    keys: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    places: torch.Tensor

    @classmethod
    def allocate(
        cls, max_num_reqs: int, most_nodes: int, device: torch.device | str
    ) -> "DraftScratch":
        """For G(N-1) nodes of each request."""

        def empty(dtype: torch.dtype = torch.int32) -> torch.Tensor:
            shape = max_num_reqs, most_nodes
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(empty(torch.int64), empty(), empty(), empty())


@triton.jit
def _store_nodes(
    tokens_ptr,  # [T] int32 of this request, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    node,
    mask,
    token,
    parent,
    depth,
    kind,
):
    tl.store(tokens_ptr + node, token, mask=mask)
    tl.store(parents_ptr + node, parent, mask=mask)
    tl.store(depths_ptr + node, depth, mask=mask)
    tl.store(kinds_ptr + node, kind, mask=mask)


@triton.jit
def _pick(rows, values):
    """values[row] of each row, if it is one of theirs; 0 otherwise."""
    mine = rows[:, None] == tl.arange(0, values.shape[0])[None, :]
    return tl.sum(tl.where(mine, values[None, :], 0), 1)


@triton.jit
def _order(cost, at):
    """A key that is the lower the less a node costs, and of equals the earlier."""
    return (cost.to(tl.int32, bitcast=True).to(tl.int64) << 32) | at.to(tl.int64)


@triton.jit
def _by_agreement(agreement, of_one, of_two, of_three):
    """The weight of what so many tokens agree with."""
    return tl.where(agreement == 1, of_one, tl.where(agreement == 2, of_two, of_three))


@triton.jit
def _add_said(tokens, scores, reads, ids_ptr, logprobs_ptr, weight):
    """Put a source's tokens into the columns that it is read for."""
    token = tl.load(ids_ptr, mask=reads, other=NO_TOKEN)
    logprob = tl.load(logprobs_ptr, mask=reads, other=NOTHING_SAID)
    score = weight * tl.maximum(logprob - NOTHING_SAID, 0.0)
    return tl.where(reads, token, tokens), tl.where(reads, score, scores)


@triton.jit
def _merge(tokens, scores, column):
    """Odds of equal tokens of a row added up, and which token is the first of them.

    Args:
        tokens, scores: [n, NEXT].
        column: [1, NEXT].
    """
    same = tokens[:, :, None] == tokens[:, None, :]
    scores = tl.log(tl.sum(tl.where(same, tl.exp(scores)[:, None, :], 0.0), 2))
    earlier = same & (column[:, None, :] < column[:, :, None])
    return scores, tl.sum(earlier.to(tl.int32), 2) == 0


@triton.jit
def _rank(key):
    """How many keys of [n, NEXT] are lower than each, a row of them at a time."""
    row = tl.arange(0, key.shape[0])[:, None]
    rank = tl.zeros_like(key).to(tl.int32)
    for i in range(key.shape[0]):
        others = tl.sum(tl.where(row == i, key, 0), 0)
        better = others[None, None, :] < key[:, :, None]
        rank += tl.sum(better.to(tl.int32), 2)
    return rank


@triton.jit
def _window(
    tokens_ptr,  # [T] int32 of this request, out, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    page_tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    window_ptr,  # [num_blocks, K, COLUMNS] int32
    table_ptr,  # [max_blocks] int32 of this request
    position,
    root,
    width,
    rows,
    num_drafted,
    max_nodes,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The window behind the candidates, if it fits whole; returns the next node."""
    node = tl.arange(0, BLOCK_T)
    num_cells = width * rows  # with the root's
    fits = (num_cells > 0) & (num_drafted + num_cells - 1 <= max_nodes)
    num_nodes = num_drafted + tl.where(fits, num_cells - 1, 0)
    cell = node - num_drafted + 1
    live = (cell >= 1) & (node < num_nodes)
    r = cell // tl.maximum(width, 1)
    column = cell - r * width

    last = tl.maximum(position - 1, 0)
    tail = tl.load(table_ptr + last // BLOCK_SIZE, mask=fits, other=0)
    page_ptr = window_ptr + tail.to(tl.int64) * (K * COLUMNS)
    cell_ptr = page_ptr + r * COLUMNS + column
    token = tl.load(cell_ptr, mask=live, other=NO_TOKEN)
    # A cell that was never written is a run of the request's own history.
    seed_at = (column * STRIDE + r) % tl.maximum(position, 1)
    seeded = live & (token == NO_TOKEN)
    slot = load_slot(table_ptr, seed_at, seeded, BLOCK_SIZE)
    seed = tl.load(page_tokens_ptr + slot, mask=seeded, other=NO_TOKEN)
    token = tl.where(token == NO_TOKEN, seed, token)
    token = tl.where(token == NO_TOKEN, root, token)

    # Row 0 runs along the columns, the others down from the row above.
    above = cell - tl.where(r == 0, 1, width)
    _store_nodes(
        tokens_ptr,
        parents_ptr,
        depths_ptr,
        kinds_ptr,
        node,
        live,
        token,
        tl.where(above == 0, 0, num_drafted - 1 + above),
        r + column,
        KIND_WINDOW,
    )
    return num_nodes


@jit
def _draft_kernel(
    tokens_ptr,  # [B, T] int32, out, as the three below
    parents_ptr,
    depths_ptr,
    kinds_ptr,
    num_nodes_ptr,  # [B] int32, out
    chances_ptr,  # [B, T] float32, out
    keys_ptr,  # [B, G*K] int64, scratch, as the three below
    grown_tokens_ptr,  # [B, G*K] int32
    grown_parents_ptr,  # [B, G*K] int32
    places_ptr,  # [B, G*K] int32
    text_cells_ptr,  # [rows, stride_text] int64, CELLS of a row
    answer_cells_ptr,  # [rows, stride_answers] int64, ANSWER_CELLS of a row
    page_tokens_ptr,  # [num_blocks, BLOCK_SIZE] int32
    ring_ptr,  # [num_blocks, RING_SIZE, N+1] int32
    window_ptr,  # [num_blocks, K, COLUMNS] int32
    answers_ptr,  # [num_blocks, KEPT, CONTEXT + ANSWERED] int32
    answer_logprobs_ptr,  # [num_blocks, KEPT, ANSWERED] float32
    block_table_ptr,  # [B, max_blocks] int32
    position_ptr,  # [B] int32
    root_ptr,  # [B] int32
    window_size_ptr,  # [B] int32
    ngram_size_ptr,  # [B] int32
    wanted_ptr,  # [B] int32, G
    max_nodes_ptr,  # [B] int32
    bigrams_ptr,  # [V, SUCCESSORS] int32
    bigram_logprobs_ptr,  # [V, SUCCESSORS] float32
    temperature_ptr,  # [B] float32
    seeds_ptr,  # [B, K] int64, so far apart
    seeds_apart,
    depths_apart,
    vocab_size,
    before_ptr,  # [B] int32, read if IS_BEHIND
    epoch_ptr,  # [1] int32
    num_tables,
    most_cost,  # of a node
    of_text_1,  # weights, as the eight below
    of_text_2,
    of_text_3,
    of_answer_1,
    of_answer_2,
    of_answer_3,
    of_bigram,
    of_noise,
    of_other,
    of_other_by_temperature,
    stride_tree,
    stride_text,
    stride_answers,
    stride_table,
    T: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,  # N-1
    COLUMNS: tl.constexpr,  # W
    BLOCK_SIZE: tl.constexpr,
    RING_SIZE: tl.constexpr,
    KEPT: tl.constexpr,  # A
    SUCCESSORS: tl.constexpr,  # R of the bigrams
    CELLS: tl.constexpr,
    ANSWER_CELLS: tl.constexpr,
    BEAM: tl.constexpr,
    NEXT: tl.constexpr,  # at least 1 + ANSWERED + SUCCESSORS
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_GROWN: tl.constexpr,  # at least G * K
    CHUNK: tl.constexpr,  # divides BLOCK_GROWN
    IS_BEHIND: tl.constexpr,  # other requests' tokens
):
    b = tl.program_id(0).to(tl.int64)
    tokens_ptr += b * stride_tree
    parents_ptr += b * stride_tree
    depths_ptr += b * stride_tree
    kinds_ptr += b * stride_tree
    chances_ptr += b * T
    table_ptr = block_table_ptr + b * stride_table
    position = tl.load(position_ptr + b)
    root = tl.load(root_ptr + b)
    levels = tl.minimum(tl.load(ngram_size_ptr + b) - 1, K)
    max_nodes = tl.minimum(tl.load(max_nodes_ptr + b), T)
    num_nodes = tl.minimum(max_nodes, 1)

    if G > 0:
        keys_ptr += b * (G * K)
        grown_tokens_ptr += b * (G * K)
        grown_parents_ptr += b * (G * K)
        places_ptr += b * (G * K)
        text_cells_ptr += b * stride_text
        answer_cells_ptr += b * stride_answers
        epoch = tl.load(epoch_ptr)
        wanted = tl.minimum(tl.load(wanted_ptr + b), G)
        num_levels = tl.where((wanted > 0) & (max_nodes > 1), levels, 0)
        temperature = tl.load(temperature_ptr + b)
        seeds_ptr += b * seeds_apart
        of_others = of_other + of_other_by_temperature * temperature
        own_position = position
        if IS_BEHIND:
            own_position -= tl.load(before_ptr + b)

        # The beam: its nodes, what they cost, and their last tokens.
        row = tl.arange(0, BEAM)
        live = row < tl.minimum(num_levels, 1)
        beam_cost = tl.zeros([BEAM], tl.float32)
        near = tl.where(live, root, NO_TOKEN)
        last = position - 1 - row
        before = live & (last >= 0)
        slot = load_slot(table_ptr, last, before, BLOCK_SIZE)
        middle = tl.load(page_tokens_ptr + slot, mask=before, other=NO_TOKEN)
        before = live & (last >= 1)
        slot = load_slot(table_ptr, last - 1, before, BLOCK_SIZE)
        far = tl.load(page_tokens_ptr + slot, mask=before, other=NO_TOKEN)

        column = tl.arange(0, NEXT)[None, :]
        for level in range(num_levels):
            h, known = hashes_of(near, middle, far, LENGTHS)
            filed = tl.zeros_like(h).to(tl.int64) + b < num_tables
            known = known & filed
            token, agreement = find_text(
                text_cells_ptr,
                page_tokens_ptr,
                ring_ptr,
                table_ptr,
                position,
                root,
                near,
                middle,
                far,
                h,
                known,
                epoch,
                BLOCK_SIZE,
                RING_SIZE,
                K + 2,
                CELLS,
            )
            weight = _by_agreement(agreement, of_text_1, of_text_2, of_text_3)
            tokens = tl.where(column == 0, token[:, None], NO_TOKEN)
            scores = tl.where(column == 0, weight[:, None], 0.0)

            entry, agreement = find_answer(
                answer_cells_ptr,
                answers_ptr,
                table_ptr,
                near,
                middle,
                far,
                h,
                known,
                epoch,
                KEPT,
                BEHIND_CONTEXT + ANSWERED,
                ANSWER_CELLS,
            )
            weight = _by_agreement(agreement, of_answer_1, of_answer_2, of_answer_3)
            at = entry[:, None] * (BEHIND_CONTEXT + ANSWERED) + BEHIND_CONTEXT
            tokens, scores = _add_said(
                tokens,
                scores,
                (agreement > 0)[:, None] & (column >= 1) & (column <= ANSWERED),
                answers_ptr + at + column - 1,
                answer_logprobs_ptr + entry[:, None] * ANSWERED + column - 1,
                weight[:, None],
            )
            if SUCCESSORS > 0:
                successor = column - 1 - ANSWERED
                at = near.to(tl.int64)[:, None] * SUCCESSORS + successor
                reads = (successor >= 0) & (successor < SUCCESSORS)
                tokens, scores = _add_said(
                    tokens,
                    scores,
                    ((near >= 0) & (near < vocab_size))[:, None] & reads,
                    bigrams_ptr + at,
                    bigram_logprobs_ptr + at,
                    of_bigram,
                )

            scores, valid = _merge(tokens, scores, column)
            valid = valid & live[:, None] & (tokens != NO_TOKEN)
            if temperature > 0:
                seed = tl.load(seeds_ptr + level * depths_apart)
                noise = gumbel_noise(seed, own_position + level, tokens)
                scores += of_noise * temperature * noise
            top = tl.max(tl.where(valid, scores, of_others), 1)
            top = tl.maximum(top, of_others)
            odds = tl.where(valid, tl.exp(scores - top[:, None]), 0.0)
            total = tl.sum(odds, 1) + tl.exp(of_others - top)
            chance = scores - top[:, None] - tl.log(total)[:, None]
            # However the logarithm is rounded, no child is likelier than its parent.
            cost = beam_cost[:, None] + tl.abs(tl.minimum(chance, 0.0))
            valid = valid & (cost <= most_cost)

            # The best of the level, in the order of their ranks.
            at = row[:, None] * NEXT + column
            rank = _rank(tl.where(valid, _order(cost, at), NOBODY))
            cost = tl.reshape(cost, [BEAM * NEXT])
            token = tl.reshape(tokens, [BEAM * NEXT])
            valid = tl.reshape(valid, [BEAM * NEXT])
            rank = tl.reshape(rank, [BEAM * NEXT])
            keep = valid & (rank < wanted)
            num_kept = tl.minimum(tl.sum(valid.to(tl.int32), 0), wanted)
            parent = tl.arange(0, BEAM * NEXT) // NEXT
            first = level * G
            tl.store(keys_ptr + first + rank, _order(cost, first + rank), mask=keep)
            tl.store(grown_tokens_ptr + first + rank, token, mask=keep)
            above = tl.where(level == 0, NO_TOKEN, first - G + parent)
            tl.store(grown_parents_ptr + first + rank, above, mask=keep)
            rest = tl.arange(0, BLOCK_G)
            rest_mask = (rest >= num_kept) & (rest < G)
            tl.store(keys_ptr + first + rest, NOBODY, mask=rest_mask)

            live = row < num_kept
            mine = (rank[None, :] == row[:, None]) & keep[None, :]
            beam_cost = tl.sum(tl.where(mine, cost[None, :], 0.0), 1)
            parent = tl.sum(tl.where(mine, parent[None, :], 0), 1)
            far = tl.where(live, _pick(parent, middle), NO_TOKEN)
            middle = tl.where(live, _pick(parent, near), NO_TOKEN)
            near = tl.sum(tl.where(mine, token[None, :], 0), 1)
            near = tl.where(live, near, NO_TOKEN)

        tl.debug_barrier()  # what follows reads what other threads have grown
        grown = tl.arange(0, BLOCK_GROWN)
        inside = grown < num_levels * G
        key = tl.load(keys_ptr + grown, mask=inside, other=NOBODY)
        rank = tl.zeros([BLOCK_GROWN], tl.int32)
        for start in range(0, num_levels * G, CHUNK):
            other = start + tl.arange(0, CHUNK)
            mask = other < num_levels * G
            others = tl.load(keys_ptr + other, mask=mask, other=NOBODY)
            rank += tl.sum((others[None, :] < key[:, None]).to(tl.int32), 1)
        taken = (key != NOBODY) & (rank + 1 < max_nodes)
        tl.store(places_ptr + grown, rank + 1, mask=taken)
        tl.debug_barrier()  # a node's place is known to its children
        parent = tl.load(grown_parents_ptr + grown, mask=taken, other=NO_TOKEN)
        below_root = taken & (parent == NO_TOKEN)
        above = tl.load(places_ptr + parent, mask=taken & (parent >= 0), other=0)
        _store_nodes(
            tokens_ptr,
            parents_ptr,
            depths_ptr,
            kinds_ptr,
            rank + 1,
            taken,
            tl.load(grown_tokens_ptr + grown, mask=taken, other=NO_TOKEN),
            tl.where(below_root, 0, above),
            grown // G + 1,
            KIND_CANDIDATE,
        )
        cost = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(chances_ptr + rank + 1, tl.exp(-cost), mask=taken)
        num_nodes += tl.sum(taken.to(tl.int32), 0)

    num_drafted = num_nodes
    if COLUMNS > 0:
        num_nodes = _window(
            tokens_ptr,
            parents_ptr,
            depths_ptr,
            kinds_ptr,
            page_tokens_ptr,
            window_ptr,
            table_ptr,
            position,
            root,
            tl.load(window_size_ptr + b),
            levels,
            num_drafted,
            max_nodes,
            K,
            COLUMNS,
            BLOCK_SIZE,
            BLOCK_T,
        )

    node = tl.arange(0, BLOCK_T)
    _store_nodes(
        tokens_ptr,
        parents_ptr,
        depths_ptr,
        kinds_ptr,
        node,
        (node == 0) | ((node >= num_nodes) & (node < T)),
        tl.where(node < num_nodes, root, NO_TOKEN),
        NO_TOKEN,
        0,
        KIND_ROOT,
    )
    no_candidate = (node == 0) | ((node >= num_drafted) & (node < T))
    tl.store(chances_ptr + node, 0.0, mask=no_candidate)
    tl.store(num_nodes_ptr + b, num_nodes)


def draft_trees(
    pages: BlockPages,
    batch: RequestBatch,
    hints: Hints,
    weights: Mapping[str, float],
    tables: IndexTables,
    scratch: DraftScratch,
    tree: DraftTree,
    chances: torch.Tensor,
) -> None:
    """Root, the likeliest candidates, then the Jacobi window, read or seeded.

    Args:
        pages: what `tables` point into, and the windows.
        batch: B requests. One with max_nodes 0 is padding: a tree of no nodes.
        hints: noise must be that of the V2 sampler. It has one seed a request: seeds
            may be [B, 1], and have any strides.
        weights: as WEIGHTS, in that order.
        tables: as `file_contexts` has left them, of the same pages and batch.
        scratch: for at least B requests, of the server's sizes.
        tree: out, T = 1 + G(N-1) + max(0, W(N-1) - 1) nodes per request.
        chances: [B, T] float32, out, of each candidate to be accepted; 0 elsewhere.

    Raises:
        ValueError: noise of another sampler.
    """
    if hints.noise is not gpu_noise:
        raise ValueError(f"noise is {hints.noise}; the kernel knows `gpu_noise` only")
    b, max_blocks = batch.block_table.shape
    _, k, w = pages.window.shape
    t = chances.shape[1]
    g = (t - 1 - max(0, w * k - 1)) // k
    cells = num_cells(max_blocks * pages.block_size)
    known = hints.bigrams, hints.bigram_logprobs, hints.temperature, hints.seeds
    before = () if hints.before is None else (hints.before,)
    given = vars(pages).values(), vars(batch).values(), vars(scratch).values()
    rest = tables.text, tables.answers, tables.epoch, *vars(tree).values(), chances
    tensors = *itertools.chain(*given), *known, *before, *rest
    if tensors not in _checked:
        expect_batch(batch)
        expect_pages(pages)
        expect("hints.bigrams", hints.bigrams, (-1, -1))
        shape = tuple(hints.bigrams.shape)
        expect("hints.bigram_logprobs", hints.bigram_logprobs, shape, torch.float32)
        expect("hints.temperature", hints.temperature, (b,), torch.float32)
        if hints.before is not None:
            expect("hints.before", hints.before, (b,))
        seeds = hints.seeds
        if seeds.dtype != torch.int64 or seeds.shape not in ((b, k), (b, 1)):
            raise ValueError(
                f"hints.seeds is {seeds.dtype} {tuple(seeds.shape)}; the kernel takes "
                f"torch.int64 {(b, k)} or {(b, 1)}"
            )
        expect("tables.text", tables.text, (-1, -1), torch.int64)
        expect("tables.answers", tables.answers, (-1, -1), torch.int64)
        expect("scratch.keys", scratch.keys, (-1, g * k), torch.int64)
        for name in ("tokens", "parents", "places"):
            expect(f"scratch.{name}", getattr(scratch, name), (-1, g * k))
        if len(scratch.keys) < b:
            raise ValueError(f"scratch is too small for {b} requests")
        expect_tree(tree, b, 1 + g * k + max(0, w * k - 1))
        expect("chances", chances, (b, t), torch.float32)
        _checked.add(tensors)
    if not b:
        return
    successors, nodes = hints.bigrams.shape[1], triton.next_power_of_2(max(g * k, 1))
    _draft_kernel[(b,)](
        tree.tokens,
        tree.parents,
        tree.depths,
        tree.kinds,
        tree.num_nodes,
        chances,
        scratch.keys,
        scratch.tokens,
        scratch.parents,
        scratch.places,
        tables.text,
        tables.answers,
        pages.tokens,
        pages.ring,
        pages.window,
        pages.answers,
        pages.answer_logprobs,
        batch.block_table,
        batch.position,
        batch.root,
        batch.window_size,
        batch.ngram_size,
        batch.verification_set_size,
        batch.max_nodes,
        hints.bigrams,
        hints.bigram_logprobs,
        hints.temperature,
        hints.seeds,
        hints.seeds.stride(0),
        hints.seeds.stride(1) if hints.seeds.shape[1] > 1 else 0,
        hints.bigrams.shape[0],
        batch.position if hints.before is None else hints.before,
        tables.epoch,
        len(tables.text),
        -math.log(hints.least) if hints.least > 0 else math.inf,
        *weights.values(),
        tree.tokens.stride(0),
        tables.text.stride(0),
        tables.answers.stride(0),
        batch.block_table.stride(0),
        T=t,
        G=g,
        K=k,
        COLUMNS=w,
        BLOCK_SIZE=pages.block_size,
        RING_SIZE=pages.ring.shape[1],
        KEPT=pages.answers.shape[1],
        SUCCESSORS=successors,
        CELLS=cells,
        ANSWER_CELLS=num_answer_cells(pages, max_blocks),
        BEAM=BEAM,
        NEXT=triton.next_power_of_2(1 + NUM_ANSWERS + successors),
        BLOCK_T=triton.next_power_of_2(t),
        BLOCK_G=triton.next_power_of_2(max(g, 1)),
        BLOCK_GROWN=nodes,
        CHUNK=min(nodes, max(8, 4096 // nodes)),
        IS_BEHIND=hints.before is not None,
        num_warps=4,
        num_stages=1,  # no load before the barrier that it waits for
    )
