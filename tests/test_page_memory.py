# SPDX-License-Identifier: Apache-2.0
"""What is said at start-up, and what of the K/V cache's memory is kept for pages."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_lookahead.core.corpus import Owners
from vllm_lookahead.core.pages import page_bytes
from vllm_lookahead.engine import page_memory
from vllm_lookahead.params import LookaheadParams

SIZES = LookaheadParams(5, 4, 3)


def full(block_size: int = 16, heads: int = 2) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=32, dtype=torch.float32
    )


def sliding(window: int) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        sliding_window=window,
    )


def state() -> MambaSpec:
    return MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=16)


def groups(*specs: Any, layers: int = 2) -> list[KVCacheGroupSpec]:
    return [KVCacheGroupSpec([f"{i}.{j}" for j in range(layers)], s)
            for i, s in enumerate(specs)]  # fmt: skip


def test_pages_get_their_part_of_the_memory() -> None:
    share = page_memory.page_share(groups(full()), SIZES)
    available = 2**30
    kv = available * (1 - share)
    blocks = kv / (2 * full().page_size_bytes)
    assert blocks * page_bytes(16, SIZES) == pytest.approx(available * share)


def test_groups_share_their_blocks() -> None:
    """A block is as large as the largest group needs, however many there are."""
    one = page_memory.page_share(groups(full()), SIZES)
    assert page_memory.page_share(groups(full(), sliding(64)), SIZES) == one
    wide = page_memory.page_share(groups(sliding(64), full(heads=4)), SIZES)
    assert wide < one
    several = UniformTypeKVCacheSpecs.from_specs({"0.0": full(), "0.1": full(heads=4)})
    assert wide < page_memory.page_share(groups(several), SIZES) < one


def test_pages_ride_the_group_that_keeps_the_most() -> None:
    several = UniformTypeKVCacheSpecs.from_specs({"0": full(), "1": full(heads=4)})
    for specs, expected in (
        ([full()], 0),
        ([sliding(64), full()], 1),
        ([sliding(64), several, sliding(32)], 1),
        ([sliding(32), sliding(64)], 1),
        ([state(), full()], 1),
    ):
        assert page_memory.page_group(groups(*specs)) == expected
    with pytest.raises(ValueError, match="a layer whose K/V cache grows with the text"):
        page_memory.page_group(groups(state()))


def test_blocks_out_of_the_window_are_not_read() -> None:
    """Up to the first block that the window of the next token reaches into."""
    table = torch.arange(1, 13, dtype=torch.int32).view(2, 6)
    position = torch.tensor([60, 79], dtype=torch.int32)
    kept = page_memory.kept_blocks(table, position, 32, 16)
    assert kept.tolist() == [[0, 2, 3, 4, 5, 6], [0, 0, 0, 10, 11, 12]]
    assert page_memory.kept_blocks(table, position, math.inf, 16) is table


def test_the_start_up_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = SimpleNamespace(info=lambda text, *values: said.append(text % values))
    monkeypatch.setattr(page_memory, "logger", log)
    page_memory.announce(SIZES, 2**20 // page_bytes(16, SIZES), 16, 0.0123)
    assert said == [
        "Lookahead is on: window_size=5, ngram_size=4, verification_set_size=3, "
        "at most 24 tokens per request and step; its pages take 1.0 MiB, "
        "1.23% of the KV cache memory."
    ]
    page_memory.announce(replace(SIZES, pool_scope="salt"), 1, 16, 0.01)
    assert said[2].endswith("under their cache_salt, or under none: pool_scope=salt.")


def test_owners_are_part_of_a_page() -> None:
    shared = replace(SIZES, pool_scope="salt")
    owners = vars(Owners.allocate(1)).values()
    columns = [x for x in owners if isinstance(x, torch.Tensor)]
    own = sum(column.numel() * column.element_size() for column in columns)
    assert page_bytes(16, shared) == page_bytes(16, SIZES) + own
