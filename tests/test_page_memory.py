# SPDX-License-Identifier: Apache-2.0
"""What is said at start-up, and what of the K/V cache's memory is kept for pages."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_lookahead.core.corpus import Owners
from vllm_lookahead.core.pages import page_bytes
from vllm_lookahead.engine import page_memory
from vllm_lookahead.params import LookaheadParams

SIZES = LookaheadParams(5, 4, 3)


def spec(block_size: int, page_size_bytes: int = 10_000) -> Any:
    return SimpleNamespace(block_size=block_size, page_size_bytes=page_size_bytes)


def test_pages_get_their_part_of_the_memory() -> None:
    share = page_memory.page_share([spec(16), spec(16)], SIZES)
    available = 2**30
    kv = available * (1 - share)
    blocks = kv / 20_000
    assert blocks * page_bytes(16, SIZES) == pytest.approx(available * share)


def test_blocks_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks have \[16, 32\] tokens"):
        page_memory.page_share([spec(16), spec(32)], SIZES)


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
