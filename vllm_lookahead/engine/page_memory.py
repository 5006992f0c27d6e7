# SPDX-License-Identifier: Apache-2.0
"""What the pages take of the K/V cache, and the line that says that lookahead is on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
except ImportError:  # vLLM 0.32
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

from vllm_lookahead.core.pages import page_bytes
from vllm_lookahead.params import SALT, LookaheadParams

NULL_BLOCK = 0

logger = init_logger("vllm.lookahead")


def page_group(groups: Sequence[Any]) -> int:
    """The group of K/V caches whose blocks the pages ride.

    One that keeps the whole context, by full or latent attention; else the one that
    keeps the longest part of it.

    Args:
        groups: vLLM's `KVCacheGroupSpec`s.

    Returns:
        Its index.

    Raises:
        ValueError: no group keeps K/V by position.
    """
    kept = [kept_tokens(group.kv_cache_spec) for group in groups]
    if not any(kept):
        raise ValueError(
            "lookahead needs a layer whose K/V cache grows with the text; this model "
            "has none: start without lookahead"
        )
    return kept.index(max(kept))


def kept_tokens(spec: Any) -> float:
    """How much of a text's K/V a layer keeps behind any token, in tokens.

    0 for a state, and for local attention by chunks, which forgets all of one at once.
    """
    if isinstance(spec, UniformTypeKVCacheSpecs):
        spec = next(iter(spec.kv_cache_specs.values()))
    if isinstance(spec, FullAttentionSpec):
        return math.inf
    if isinstance(spec, SlidingWindowSpec):
        return spec.sliding_window
    return 0


def kept_blocks(
    block_table: torch.Tensor, position: torch.Tensor, kept: float, block_size: int
) -> torch.Tensor:
    """The block table without the blocks that slid out of a window.

    vLLM has given them to other requests, whose tokens are none of this one's business.
    In their place is vLLM's null block, whose page nobody writes.

    Args:
        block_table: [B, max_blocks] int32.
        position: [B] int32, p of each request.
        kept: what `kept_tokens` says of the group.
        block_size: tokens per block.
    """
    if math.isinf(kept):
        return block_table
    first = (position - int(kept) + 1).clamp(min=0) // block_size
    column = torch.arange(block_table.shape[1], device=block_table.device)
    return block_table.masked_fill(column < first[:, None], NULL_BLOCK)


def cache_groups(vllm_config: Any, specs: Mapping[str, Any]) -> list[Any]:
    """vLLM's `KVCacheGroupSpec`s of a model.

    Args:
        vllm_config: the runner's.
        specs: vLLM's `KVCacheSpec` of each layer, by its name.
    """
    return get_kv_cache_groups(vllm_config, dict(specs))


def page_share(groups: Sequence[Any], sizes: LookaheadParams) -> float:
    """The part of the K/V cache's memory that pages take.

    Groups share the blocks, each of which is as large as the largest group needs.

    Args:
        groups: vLLM's `KVCacheGroupSpec`s.
        sizes: the server's.

    Raises:
        ValueError: no group keeps K/V by position.
    """
    page = page_bytes(groups[page_group(groups)].kv_cache_spec.block_size, sizes)
    return page / (page + max(block_bytes(group) for group in groups))


def block_bytes(group: Any) -> int:
    """What the layers of a group keep in one block."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return spec.page_size_bytes
    return spec.page_size_bytes * len(group.layer_names)


def announce(
    sizes: LookaheadParams, num_blocks: int, block_size: int, share: float
) -> None:
    """Say that lookahead is on, how wide, and at what price in memory."""
    logger.info(
        "Lookahead is on: window_size=%d, ngram_size=%d, verification_set_size=%d, at "
        "most %d tokens per request and step; its pages take %.1f MiB, %.2f%% of the "
        "KV cache memory.",
        sizes.window_size,
        sizes.ngram_size,
        sizes.verification_set_size,
        sizes.max_tree_size,
        page_bytes(block_size, sizes) * num_blocks / 2**20,
        100 * share,
    )
    if sizes.pool_scope == SALT:
        logger.info(
            "Requests draft from all that is in the KV cache under their cache_salt, "
            "or under none: pool_scope=salt."
        )
