# SPDX-License-Identifier: Apache-2.0
"""What the pages take of the K/V cache, and the line that says that lookahead is on."""

from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger

from vllm_lookahead.core.pages import page_bytes
from vllm_lookahead.params import SALT, LookaheadParams

logger = init_logger("vllm.lookahead")


def page_share(specs: Iterable[Any], sizes: LookaheadParams) -> float:
    """The part of the K/V cache's memory that pages take.

    Args:
        specs: vLLM's `KVCacheSpec` of each layer.
        sizes: the server's.

    Raises:
        ValueError: layers whose blocks differ in size.
    """
    specs = list(specs)
    block_sizes = {spec.block_size for spec in specs}
    if len(block_sizes) != 1:
        raise ValueError(
            "lookahead needs one kind of K/V cache; this model's blocks have "
            f"{sorted(block_sizes)} tokens: start without lookahead"
        )
    page = page_bytes(block_sizes.pop(), sizes)
    return page / (page + sum(spec.page_size_bytes for spec in specs))


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
