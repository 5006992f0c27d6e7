# SPDX-License-Identifier: Apache-2.0
"""Paged attention in PyTorch, for a CPU that runs the V2 engine.

vLLM's CPU kernel keeps K in a layout of its own, which the Triton kernels do not
read. This one keeps K/V as every GPU backend does. It is for the interpreter; a CPU
that serves has the V1 engine.
"""

from typing import Any

import torch
import torch.nn.functional as F


class TorchAttention:
    """Mixed into vLLM's CPU implementation, whose metadata it takes."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        cache = kv_cache.transpose(1, 2)  # [num_blocks, block_size, Hkv, 2D]
        n = min(len(slot_mapping), len(key))
        real = slot_mapping[:n] >= 0
        slot, size = slot_mapping[:n][real], cache.shape[1]
        both = torch.cat([key[:n][real], value[:n][real]], -1)
        cache[slot // size, slot % size] = both.to(cache.dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output
        cache = kv_cache.transpose(1, 2)
        size = cache.shape[1]
        start = attn_metadata.query_start_loc.tolist()
        for b, length in enumerate(attn_metadata.seq_lens.tolist()):
            rows = slice(start[b], start[b + 1])
            slot = torch.arange(length)
            block = attn_metadata.block_table[b, slot // size].long()
            k, v = cache[block, slot % size].transpose(0, 1).chunk(2, -1)
            q = query[rows].transpose(0, 1)
            seen = slot <= slot[length - (rows.stop - rows.start) :, None]
            output[rows] = F.scaled_dot_product_attention(
                q,
                k.to(q.dtype),
                v.to(q.dtype),
                attn_mask=seen,
                scale=self.scale,  # type: ignore[attr-defined]
                enable_gqa=True,
            ).transpose(0, 1)
        return output
