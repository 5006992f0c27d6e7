# SPDX-License-Identifier: Apache-2.0
"""`core.draft.forest` in Numba."""

import numpy as np
import torch

from vllm_lookahead.core.draft.forest import HALF_OCTAVE, Worth
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import ROOT, WINDOW, DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.arrays import array, output_array
from vllm_lookahead.numba_kernels.jit import kernel


@kernel
def _bin_of(chance, num_bins, half_octave):
    number, edge = 0, half_octave
    while number < num_bins - 1 and chance <= edge:
        number, edge = number + 1, edge * half_octave
    return number


@kernel
def _cut_kernel(
    tokens,  # [B, T] int32, as the three below; in and out, as the next two
    parents,
    depths,
    kinds,
    num_nodes,  # [B] int32
    chances,  # [B, T] float32
    shares,  # [bins] float64
    seconds,  # [1 + nodes] float64
    per_emitted,
    emitted,
    half_octave,
):
    size, count = tokens.shape[1], 0
    cells = np.empty(chances.size, np.int64)
    values = np.empty(chances.size)
    for b in range(num_nodes.shape[0]):
        if kinds[b, num_nodes[b] - 1] != WINDOW:
            for node in range(1, num_nodes[b]):
                if chances[b, node] > 0:
                    cells[count], values[count] = b * size + node, -chances[b, node]
                    count += 1
    order = np.argsort(values[:count], kind="mergesort")
    best, kept = emitted / (seconds[0] + per_emitted * emitted), 0
    for i in range(count):
        chance = values[order[i]]
        emitted -= chance * shares[_bin_of(-chance, shares.shape[0], half_octave)]
        speed = emitted / (seconds[i + 1] + per_emitted * emitted)
        if speed > best:
            best, kept = speed, i + 1
    for i in range(kept, count):
        b, node = cells[order[i]] // size, cells[order[i]] % size
        tokens[b, node] = parents[b, node] = EMPTY
        depths[b, node], kinds[b, node] = 0, ROOT
        num_nodes[b] -= 1
        chances[b, node] = 0.0
    return -values[order[kept]] if kept < count else 0.0


def cut(tree: DraftTree, chances: torch.Tensor, worth: Worth) -> float:
    """`core.draft.forest.cut`."""
    return _cut_kernel(
        *(output_array(column, torch.int32) for column in vars(tree).values()),
        output_array(chances, torch.float32),
        worth.shares,
        worth.seconds,
        worth.per_emitted,
        worth.emitted,
        HALF_OCTAVE,
    )


@kernel
def _count_kept_kernel(
    chances,  # [B, T] float32
    path,  # [B, N] int32
    num_emitted,  # [B] int32
    promised,  # [bins] float64, in and out, as the next
    kept,
    half_octave,
):
    for b in range(chances.shape[0]):
        for node in range(1, chances.shape[1]):
            if chances[b, node] > 0:
                number = _bin_of(chances[b, node], promised.shape[0], half_octave)
                promised[number] += chances[b, node]
        for i in range(1, num_emitted[b]):
            chance = chances[b, path[b, i]]
            if chance > 0:
                kept[_bin_of(chance, promised.shape[0], half_octave)] += 1


def count_kept(
    chances: torch.Tensor, verdict: Verdict, promised: np.ndarray, kept: np.ndarray
) -> None:
    """`core.draft.forest.count_kept`."""
    _count_kept_kernel(
        array(chances, torch.float32),
        array(verdict.path, torch.int32),
        array(verdict.num_emitted, torch.int32),
        promised,
        kept,
        HALF_OCTAVE,
    )
