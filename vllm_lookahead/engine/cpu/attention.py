# SPDX-License-Identifier: Apache-2.0
"""CPU attention that knows draft trees.

vLLM's C++ kernel serves every row: prompts, plain decodes, and trees that are one
chain, for which causal order is tree order. Where no tree can be anything else, that
is all. Trees that branch are attended again here, over the same paged cache, with
the ancestor mask.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_lookahead.engine.bigrams import LoneTokens

# How the C++ kernels of this ISA pack a block; see `kv_views`.
REQUIRED_ISA = "vec"


@dataclass
class TreeRows:
    """One branching tree's rows of the flat batch.

    Attributes:
        rows: the T tokens of the tree in the flat batch.
        blocks: [n] int64, physical blocks of positions 0 to p+T-1.
        length: p+T, slots that hold something.
        bias: [g*T, T] float32, 0 where a node sees another, else -inf; once for
            each of the g query heads of a K/V head.
    """

    rows: slice
    blocks: torch.Tensor
    length: int
    bias: torch.Tensor


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    trees: list[TreeRows] = field(default_factory=list)


class TreeAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    isa: str

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeAttentionMetadata:
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return TreeAttentionMetadata(**vars(plain))

    def _set_isa_to_layers(self, layer_names: list[str]) -> None:
        # AMX packs K in tiles of its own; trees read the plain packing.
        if self.isa == "amx":
            self.isa = REQUIRED_ISA
        if self.isa != REQUIRED_ISA:
            raise ValueError(
                f"drafts that branch cannot read a CPU's K/V packing {self.isa!r} "
                f"(block_size={self.block_size}, head_size={self.head_dim}): use a "
                "block_size that is a multiple of 32 and a model whose head size is, "
                "or window_size=0 with verification_set_size=1"
            )
        super()._set_isa_to_layers(layer_names)


class ChainAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's, but for the question that `engine.bigrams` asks."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | LoneTokens | None,
        output: torch.Tensor,
        **scales: Any,
    ) -> torch.Tensor:
        if isinstance(attn_metadata, LoneTokens):
            return attn_metadata.attend(query, key, value, output, self.scale)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, **scales
        )


class TreeAttentionImpl(ChainAttentionImpl):
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | LoneTokens | None,
        output: torch.Tensor,
        **scales: Any,
    ) -> torch.Tensor:
        super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, **scales
        )
        if isinstance(attn_metadata, TreeAttentionMetadata) and attn_metadata.trees:
            keys, values = kv_views(kv_cache)
            out = output.view(query.shape)
            for tree in attn_metadata.trees:
                out[tree.rows] = tree_attention(
                    query[tree.rows], keys, values, tree, self.scale
                )
        return output


class ChainAttentionBackend(CPUAttentionBackend):
    """Where every tree is a chain: any packing of K/V will do."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ChainAttentionImpl


class TreeAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return TreeAttentionMetadataBuilder


def kv_views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer as the C++ kernels pack them.

    A block holds K as [head_size, block_size], ready for q @ K, and V as
    [block_size, head_size].

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].

    Returns:
        keys: [num_blocks, num_kv_heads, head_size, block_size].
        values: [num_blocks, num_kv_heads, block_size, head_size].
    """
    num_blocks, heads, block_size, both = kv_cache.shape
    halves = kv_cache.view(num_blocks, heads, 2, block_size * both // 2)
    keys = halves[:, :, 0].unflatten(-1, (both // 2, block_size))
    return keys, halves[:, :, 1].unflatten(-1, (block_size, both // 2))


def slot_views(kv_cache: torch.Tensor) -> list[torch.Tensor]:
    """K and V of a layer as [num_blocks, block_size, ...], for compaction."""
    keys, values = kv_views(kv_cache)
    return [keys.permute(0, 3, 1, 2), values.permute(0, 2, 1, 3)]


def tree_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: TreeRows,
    scale: float,
) -> torch.Tensor:
    """Attend one tree over its context and itself.

    Args:
        query: [T, num_heads, head_size].
        keys, values: as `kv_views` gives them.
        tree: where the K/V lies and who sees what.
        scale: softmax scale.

    Returns:
        [T, num_heads, head_size].
    """
    num_nodes, num_heads, head_size = query.shape
    kv_heads, length = keys.shape[1], tree.length
    group = num_heads // kv_heads

    # Slots beyond the tree are cut off, not masked: a NaN there would spread.
    k = keys[tree.blocks].permute(1, 2, 0, 3).flatten(2)[..., :length]
    v = values[tree.blocks].transpose(0, 1).flatten(1, 2)[:, :length]
    q = query.view(num_nodes, kv_heads, group, head_size).permute(1, 2, 0, 3)
    q = q.reshape(kv_heads, group * num_nodes, head_size)
    scores = (q.float() * scale) @ k.float()
    scores[..., -num_nodes:] += tree.bias
    out = scores.softmax(-1) @ v.float()
    out = out.view(kv_heads, group, num_nodes, head_size).permute(2, 0, 1, 3)
    return out.reshape(query.shape).to(query.dtype)
