# SPDX-License-Identifier: Apache-2.0
"""Tree attention in two steps: FlashAttention over the contexts, then our kernel
over the trees, which starts from FlashAttention's output and LSE.

An alternative to `attention.tree_attention`, to be measured against it.
"""

from collections.abc import Callable

import torch

from vllm_lookahead.triton_kernels.attention import tree_attention
from vllm_lookahead.triton_kernels.attention_config import TreeBatch
from vllm_lookahead.triton_kernels.checks import expect

# Takes q, k_cache, v_cache, batch, out, scale and softcap. Writes attention over
# the contexts alone into `out` and returns its LSE: [Hq, N] float32, natural log,
# infinite where a context is empty.
ContextAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, TreeBatch, torch.Tensor, float, float],
    torch.Tensor,
]


def flash_context_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: TreeBatch,
    out: torch.Tensor,
    scale: float,
    softcap: float,
    *,
    num_splits: int = 0,
    scheduler_metadata: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ContextAttention` by vLLM's FlashAttention, in the version for this GPU.

    Args:
        num_splits: 0 for FlashAttention's own choice.
        scheduler_metadata: of FlashAttention 3, made for these contexts and not
            causal; a CUDA graph needs it, and a fixed number of splits.
    """
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
    )

    block_size = k_cache.shape[1]
    longest = batch.max_context_len or batch.block_table.shape[1] * block_size
    _, lse = flash_attn_varlen_func(
        q=q,
        k=k_cache,
        v=v_cache,
        out=out,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.context_lens,
        max_seqlen_k=longest,
        block_table=batch.block_table,
        softmax_scale=scale,
        softcap=softcap,
        causal=False,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=q.shape[2]),
        num_splits=num_splits,
        scheduler_metadata=scheduler_metadata,
    )
    return lse


def merged_tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: TreeBatch,
    out: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    context_attention: ContextAttention = flash_context_attention,
) -> None:
    """`tree_attention`, without a sliding window and without an fp8 cache."""
    lse = context_attention(q, k_cache, v_cache, batch, out, scale, softcap)
    expect("lse", lse, (q.shape[1], q.shape[0]), torch.float32)
    tree_attention(
        q, k_cache, v_cache, batch, out, scale, softcap=softcap, prior_lse=lse
    )
