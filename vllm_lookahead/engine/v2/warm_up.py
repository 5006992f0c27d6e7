# SPDX-License-Identifier: Apache-2.0
"""Compile what a server will launch, before it serves."""

import time
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from vllm_lookahead.engine.v2.attention import TreeMetadata, attention_layers
from vllm_lookahead.triton_kernels import attention
from vllm_lookahead.triton_kernels.attention_config import TreeBatch
from vllm_lookahead.triton_kernels.ops import TritonOps

if TYPE_CHECKING:
    from vllm_lookahead.engine.v2.model_runner import LookaheadModelRunner

logger = init_logger("vllm.lookahead")


@torch.inference_mode()
def warm_up(runner: "LookaheadModelRunner") -> None:
    """Launch every variant of every kernel on a request that has no rows."""
    if not isinstance(runner.ops, TritonOps):
        return
    started = time.perf_counter()
    table = runner.block_tables.input_block_tables[runner.page_group]
    batch, hints = runner.speculator.warm_up(table)
    runner.ops.warm_up(
        runner.pages,
        table,
        runner.slot_views,
        hints,
        runner.model_config.head_dtype,
        batch.block_table,
    )
    runner.step.warm_up(runner.waiting, runner.speculator.drafts[:1])
    seen = set()
    layers = attention_layers(runner.vllm_config) if runner.branches else {}
    for layer in layers.values():
        sizes = layer.num_heads, layer.num_kv_heads, layer.head_size
        geometry = (*sizes, layer.kv_cache.stride(), layer.impl.logits_soft_cap)
        if geometry not in seen:
            seen.add(geometry)
            _attention(runner, layer, table)
    logger.info(
        "Lookahead's kernels were compiled in %.1f s", time.perf_counter() - started
    )


def _attention(
    runner: "LookaheadModelRunner", layer: torch.nn.Module, table: torch.Tensor
) -> None:
    def zeros(heads: int) -> torch.Tensor:
        shape = (1, heads, layer.head_size)
        return torch.zeros(shape, dtype=runner.dtype, device=runner.device)

    q, k, out = (
        zeros(n) for n in (layer.num_heads, layer.num_kv_heads, layer.num_heads)
    )
    step = runner.step

    def attend(batch: TreeBatch) -> None:
        metadata = TreeMetadata(batch, num_tokens=1)
        layer.impl.forward(layer, q, k, k, layer.kv_cache, metadata, out)

    empty = TreeBatch(
        query_start_loc=torch.zeros(2, dtype=torch.int32, device=runner.device),
        context_lens=step.position[:1],
        block_table=table[:1],
        ancestor_bits=step.bits[:1],
        max_query_len=step.bits.shape[1],
        max_context_len=runner.max_model_len,
    )
    group = layer.num_heads // layer.num_kv_heads
    attention.warm_up(attend, empty, out, group, layer.impl.scratch)
