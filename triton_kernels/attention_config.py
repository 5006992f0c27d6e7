# SPDX-License-Identifier: Apache-2.0
"""What a tree attention launch looks like: the batch, the tiles, the splits.

All of it follows from maxima known on the host, so that a CUDA graph can replay the
launch for other trees and longer contexts.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton

from vllm_lookahead.triton_kernels.checks import Checked, expect

_checked = Checked()

MAX_SPLITS = 32
MIN_SPLIT = 256  # tokens of context; fewer do not pay for the merge
# Most shared memory of a program; 99 on the GPUs not listed.
SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
H200_SMS = 132  # assumed where there is no GPU to ask


@dataclass(frozen=True)
class TreeBatch:
    """The trees of one step. A plain request is a tree of one node.

    Attributes:
        query_start_loc: [B+1] int32, first row of each request in the flat batch;
            a request of padding has no rows.
        context_lens: [B] int32, p: tokens before the tree, whose K/V is final. The
            tree's own K/V is in the slots of positions p, p+1, ...
        block_table: [B, max_blocks] int32.
        ancestor_bits: [B, T, ceil(T/32)] int32; node i sees node j if bit j % 32 of
            word j // 32 is set. It sees itself.
        max_query_len: most nodes of a request, at most T.
        depths: [B, T] int32, node i's position is p + depth; read only with a
            sliding window.
        max_context_len: a bound of `context_lens`, to limit the splits; without it
            the block table's width is one.
    """

    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    ancestor_bits: torch.Tensor
    max_query_len: int
    depths: torch.Tensor | None = None
    max_context_len: int | None = None

    def __post_init__(self) -> None:
        b, t, _ = self.ancestor_bits.shape
        depths = () if self.depths is None else (self.depths,)
        tensors = (
            self.query_start_loc,
            self.context_lens,
            self.block_table,
            *depths,
            self.ancestor_bits,
        )
        if tensors not in _checked:
            expect("query_start_loc", self.query_start_loc, (b + 1,))
            expect("context_lens", self.context_lens, (b,))
            expect("block_table", self.block_table, (b, -1), rows_apart=True)
            words = triton.cdiv(t, 32)
            expect("ancestor_bits", self.ancestor_bits, (b, t, words), rows_apart=True)
            for column in depths:
                expect("depths", column, (b, t), rows_apart=True)
            _checked.add(tensors)
        if not 1 <= self.max_query_len <= t:
            raise ValueError(f"max_query_len {self.max_query_len} is not in 1..{t}")


class Config(NamedTuple):
    block_m: int  # rows: nodes times the query heads of a K/V head
    block_n: int  # tokens of context
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that an SM holds at once


class SplitScratch(NamedTuple):
    """Partial results of a split launch; one serves all layers and all steps."""

    partial: torch.Tensor  # [rows, D] float32
    lse: torch.Tensor  # [rows] float32

    @classmethod
    def allocate(
        cls, head_size: int, device: torch.device | str, rows: int = 0
    ) -> "SplitScratch":
        """By default what the splits of `default_splits` need."""
        rows = rows or 2 * num_sms() * (256 if head_size <= 64 else 128)
        return cls(
            torch.empty(rows, head_size, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )


@cache
def num_sms() -> int:
    if not torch.cuda.is_available():
        return H200_SMS
    return torch.cuda.get_device_properties().multi_processor_count


def target_arch() -> int:
    """90 for sm_90: what Triton compiles for."""
    if triton.knobs.runtime.interpret:
        return 90
    return triton.runtime.driver.active.get_current_target().arch


@cache
def _config(head_size: int, rows: int, arch: int, item: int = 2) -> Config:
    """Tiles of a launch: all rows in one if they fit, for K/V is then read once.

    No 16-bit one up to a head size of 128 spills on sm_80, sm_90 and sm_100. (At
    128, 128 rows did on sm_90 with 4 warps, and on sm_80 with tiles of 64 tokens.)

    Args:
        rows: nodes of the largest tree times the query heads of a K/V head.
        arch: 90 for sm_90.
        item: bytes of an element of q.
    """
    line = triton.next_power_of_2(head_size) * item
    shared = SHARED_KIB.get(arch, 99) * 1024
    block_m = min(max(16, triton.next_power_of_2(rows)), 128)
    while block_m * line > shared // 3:
        block_m //= 2
    # Tensor cores that read Q and K from shared memory, not from registers.
    reads_shared = arch in (90, 100, 103)
    wide = block_m == 128 or (not reads_shared and block_m * line >= 2**15)
    num_warps = 8 if wide else 4
    most = (16 if reads_shared and line <= 128 else 8) // num_warps  # by registers
    longest = 64 if line <= (256 if reads_shared else 128) else 32
    if arch in (100, 103) and line <= 128:
        longest = 32  # 64 tokens spilled 8 bytes
    # Loads run a tile fewer ahead than there are stages: with 2, hardly at all. Two
    # programs on an SM cover for each other; one needs more stages.
    for per_sm in range(most, 0, -1):
        for block_n, stages in ((64, 4), (64, 3), (32, 4), (32, 3), (32, 2), (32, 1)):
            if block_n > longest or (stages < 3 and per_sm > 1):
                continue
            if block_m * line + 2 * stages * block_n * line <= shared // per_sm:
                return Config(block_m, block_n, num_warps, stages, per_sm)
    raise ValueError(f"head size {head_size} does not fit an SM of sm_{arch}")


def default_splits(programs: int, config: Config, max_context_len: int) -> int:
    """Parts to split each context into, so that no SM idles.

    Of the counts that need at most two waves of programs, the smallest one whose
    waves are nearly as full as any's.

    Args:
        programs: of the launch without splits.
    """
    return _splits(programs, num_sms() * config.per_sm, max_context_len)


@lru_cache(4096)
def _splits(programs: int, slots: int, max_context_len: int) -> int:
    most = min(MAX_SPLITS, 2 * slots // programs, max_context_len // MIN_SPLIT)
    if programs >= 0.8 * slots or most <= 1:
        return 1
    waves = [programs * splits / slots for splits in range(1, most + 1)]
    fill = [wave / -(-wave // 1) for wave in waves]
    return 1 + next(i for i, f in enumerate(fill) if f >= 0.85 * max(fill))
