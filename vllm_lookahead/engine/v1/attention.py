# SPDX-License-Identifier: Apache-2.0
"""CPU attention that knows draft trees.

vLLM's C++ kernel serves every row: prompts, plain decodes, and trees that are one
chain, for which causal order is tree order. Where no tree can be anything else, that
is all. Trees that branch are attended here, over the same paged cache, each node over
the context, its ancestors and itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_lookahead.engine.bigrams import LoneTokens
from vllm_lookahead.numba_kernels.attention import DTYPES, TreeRows, tree_attention

# C++ kernels that pack a block as `kv_views` reads it.
READABLE_ISAS = "vec", "vec16"
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn,
       "fp8_e5m2": torch.float8_e5m2}  # fmt: skip


@dataclass
class TreeAttentionMetadata(CPUAttentionMetadata):
    trees: TreeRows | None = None


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
            self.isa = "vec"
        if self.isa not in READABLE_ISAS:
            raise ValueError(
                f"drafts that branch cannot read this CPU's K/V packing {self.isa!r}: "
                "use window_size=0 with verification_set_size=1"
            )
        super()._set_isa_to_layers(layer_names)


class ChainAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's, in one call per layer, and for the question that `engine.bigrams` asks.

    The views of a layer's cache are made once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_type != AttentionType.DECODER:
            raise ValueError(
                f"attention of the type {self.attn_type!r} is not supported by "
                "lookahead: start without it"
            )
        self._cache: torch.Tensor | None = None
        self._halves: tuple[torch.Tensor, ...] = ()

    def forward(
        self,
        layer: Any,
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
        if attn_metadata is not None:
            self._write(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        # vLLM's own forward converts attention sinks.
        if attn_metadata is None or self.sinks is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, **scales
            )
        keys, values = self._halves
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=attn_metadata.seq_lens,
            scale=self.scale,
            causal=attn_metadata.causal,
            alibi_slopes=self.alibi_slopes,
            sliding_window=self.sliding_window,
            block_table=attn_metadata.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=attn_metadata.scheduler_metadata,
            s_aux=None,
            dynamic_causal=attn_metadata.dynamic_causal,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return output

    def _write(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """K and V of the step's tokens into the layer's cache."""
        if self._cache is not kv_cache:
            num_blocks, heads, block_size, _ = kv_cache.shape
            halves = kv_cache.view(num_blocks, heads, 2 * block_size, -1)
            self._cache, self._halves = kv_cache, halves.chunk(2, dim=2)
        if self.kv_sharing_target_layer_name is None:
            keys, values = self._halves
            ops.cpu_attn_reshape_and_cache(
                key,
                value,
                keys,
                values,
                slots,
                layer.isa,
                k_scale=layer._k_scale_float,
                v_scale=layer._v_scale_float,
                kv_cache_dtype=self.kv_cache_dtype,
            )


class TreeAttentionImpl(ChainAttentionImpl):
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | LoneTokens | None,
        output: torch.Tensor,
        **scales: Any,
    ) -> torch.Tensor:
        given = layer, query, key, value, kv_cache, attn_metadata, output
        if not isinstance(attn_metadata, TreeAttentionMetadata):
            return super().forward(*given, **scales)
        trees = attn_metadata.trees
        if trees is None or not trees.covers_batch:
            super().forward(*given, **scales)
        else:
            self._write(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        if trees is not None:
            self._attend_trees(layer, query, kv_cache, trees, output.view(query.shape))
        return output

    def _attend_trees(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        trees: TreeRows,
        out: torch.Tensor,
    ) -> None:
        """On one thread as vLLM's kernels would, to the last bit; else in PyTorch."""
        as_vllm = kv_cache.dtype in DTYPES and not self.logits_soft_cap
        if as_vllm and torch.get_num_threads() == 1:
            tree_attention(query, kv_cache, trees, self.scale, out)
            return
        fp8 = None
        if self.is_fp8_kv_cache:
            scales = layer._k_scale_float, layer._v_scale_float
            fp8 = FP8[self.kv_cache_dtype], *scales
        keys, values = kv_views(kv_cache)
        masked_attention(
            query, keys, values, trees, self.scale, self.logits_soft_cap, out, fp8
        )


class ChainAttentionBackend(CPUAttentionBackend):
    """Where every tree is a chain: any packing of K/V will do."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return ChainAttentionImpl


class TreeAttentionBackend(ChainAttentionBackend):
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


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    trees: TreeRows,
    scale: float,
    soft_cap: float,
    out: torch.Tensor,
    fp8: tuple[torch.dtype, float, float] | None = None,
) -> None:
    """`numba_kernels.attention.tree_attention` in PyTorch, up to rounding.

    Args:
        query: [num_rows, num_heads, head_size].
        keys, values: as `kv_views` gives them.
        trees: the rows to attend.
        scale: softmax scale.
        soft_cap: of the logits; 0 for none.
        out: as `query`; the rows of `trees` are written.
        fp8: what the bytes of keys and values are, and their scales.
    """
    num_heads, kv_heads = query.shape[1], keys.shape[1]
    group, block_size = num_heads // kv_heads, keys.shape[3]
    for b, first in enumerate(trees.first_row.tolist()):
        n = int(trees.num_nodes[b])
        length = int(trees.position[b]) + n
        blocks = torch.from_numpy(trees.block_table[b, : -(-length // block_size)])
        # Slots beyond the tree are cut off, not masked: a NaN there would spread.
        k = keys[blocks.long()].permute(1, 2, 0, 3).flatten(2)[..., :length]
        v = values[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :length]
        if fp8 is not None:  # the blocks of a tree, not the whole cache
            kind, k_scale, v_scale = fp8
            k, v = k.view(kind).float() * k_scale, v.view(kind).float() * v_scale
        q = query[first : first + n].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        scores = (q.flatten(1, 2).float() * scale) @ k.float()  # [h, group * n, length]
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        unseen = ~torch.from_numpy(trees.sees[b, :n, :n]).repeat(group, 1)
        scores[..., -n:].masked_fill_(unseen, -torch.inf)
        attended = (scores.softmax(-1) @ v.float()).unflatten(1, (group, n))
        out[first : first + n] = (
            attended.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
        )
