# SPDX-License-Identifier: Apache-2.0
"""Attention: trees through our kernel, everything else through vLLM's backend.

Once the model is loaded, each attention layer's backend becomes a subclass of
itself. A step without trees, and the prefills of one with trees, run exactly as
before. Trees come first in the batch, so a step splits at one row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_lookahead.engine.bigrams import LoneTokens
from vllm_lookahead.engine.v2.cpu_attention import TorchAttention
from vllm_lookahead.triton_kernels.attention import tree_attention
from vllm_lookahead.triton_kernels.attention_config import SplitScratch, TreeBatch

if TYPE_CHECKING:
    from vllm_lookahead.engine.v2.trees import StepTrees

# Their caches are [num_blocks, num_kv_heads, block_size, 2 * head_size], K before V.
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN")
FP8_CACHES = ("fp8", "fp8_e4m3")


@dataclass
class TreeMetadata:
    """Attention metadata of a step with trees.

    Attributes:
        trees: the first requests of the batch.
        num_tokens: how many rows they have.
        rest: the backend's own metadata of the other requests, if any.
    """

    trees: TreeBatch
    num_tokens: int
    rest: Any | None = None


class TreeMetadataBuilder:
    """Mixed into a backend's metadata builder. `step` is the runner's."""

    step: "StepTrees"

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        build = super().build  # type: ignore[misc]
        common, count = common_attn_metadata, self.step.attended
        if not count:
            return build(common_prefix_len, common, fast_build)
        if self.step.covers_batch:
            return self._trees(common, common.num_reqs, common.num_actual_tokens)
        num_tokens = int(common.query_start_loc_cpu[count])
        metadata = self._trees(common, count, num_tokens)
        rest = _requests_from(common, count, num_tokens)
        metadata.rest = build(common_prefix_len, rest, fast_build)
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> Any:
        # Graphs of one token per request are for steps without trees.
        if common_attn_metadata.max_query_len == 1:
            return super().build_for_cudagraph_capture(  # type: ignore[misc]
                common_attn_metadata
            )
        common = common_attn_metadata
        return self._trees(common, common.num_reqs, common.num_actual_tokens)

    def _trees(
        self, common: CommonAttentionMetadata, count: int, num_tokens: int
    ) -> TreeMetadata:
        step = self.step
        return TreeMetadata(
            TreeBatch(
                query_start_loc=common.query_start_loc[: count + 1],
                context_lens=step.position[:count],
                block_table=common.block_table_tensor[:count],
                ancestor_bits=step.bits[:count],
                max_query_len=min(common.max_query_len, step.bits.shape[1]),
                max_context_len=common.max_seq_len,
            ),
            num_tokens,
        )

    @classmethod
    def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
        support = super().get_cudagraph_support(*args)  # type: ignore[misc]
        # Any mix of trees, but no prefill, may share a graph.
        if support == AttentionCGSupport.NEVER:
            return support
        return AttentionCGSupport.UNIFORM_BATCH


def _requests_from(
    common: CommonAttentionMetadata, first: int, first_token: int
) -> CommonAttentionMetadata:
    """The metadata of the requests from `first` on."""
    start = common.query_start_loc_cpu[first:] - first_token

    def tail(values: Any) -> Any:
        return None if values is None else values[first:]

    return common.replace(
        query_start_loc=common.query_start_loc[first:] - first_token,
        query_start_loc_cpu=start,
        seq_lens=common.seq_lens[first:],
        num_reqs=common.num_reqs - first,
        num_actual_tokens=common.num_actual_tokens - first_token,
        max_query_len=int((start[1:] - start[:-1]).max()),
        block_table_tensor=common.block_table_tensor[first:],
        slot_mapping=common.slot_mapping[first_token:],
        positions=None if common.positions is None else common.positions[first_token:],
        is_prefilling=tail(common.is_prefilling),
        seq_lens_cpu_upper_bound=tail(common.seq_lens_cpu_upper_bound),
        req_idx=tail(common.req_idx),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class TreeAttention:
    """Mixed into a backend's implementation. `scratch` is shared by all layers.

    Trees have queries of the model's dtype. vLLM's layer would quantize all of them
    for an fp8 cache, so its `query_quant` is the implementation's.
    """

    scratch: SplitScratch | None
    query_quant: Any | None

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
        forward = super().forward  # type: ignore[misc]
        if not isinstance(attn_metadata, TreeMetadata):
            return forward(
                layer,
                self._quantized(layer, query),
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        n, rest = attn_metadata.num_tokens, attn_metadata.rest
        if rest is not None:
            others = self._quantized(layer, query[n:])
            forward(layer, others, key[n:], value[n:], kv_cache, rest, output[n:])
        fp8 = kv_cache.element_size() == 1
        cache = kv_cache.view(torch.float8_e4m3fn) if fp8 else kv_cache
        k_cache, v_cache = cache.transpose(1, 2).chunk(2, dim=-1)
        tree_attention(
            query[:n],
            k_cache,
            v_cache,
            attn_metadata.trees,
            output[:n],
            self.scale,  # type: ignore[attr-defined]
            softcap=self.logits_soft_cap or 0.0,  # type: ignore[attr-defined]
            k_scale=layer._k_scale.view(1) if fp8 else None,
            v_scale=layer._v_scale.view(1) if fp8 else None,
            scratch=self.scratch,
        )
        return output

    def _quantized(self, layer: Any, query: torch.Tensor) -> torch.Tensor:
        """Queries as the backend takes them: [n, num_heads, head_size]."""
        if self.query_quant is None:
            return query
        rows, _ = self.query_quant(query.flatten(1), layer._q_scale)
        return rows.view(query.shape)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Our kernel writes the model's dtype."""
        return False


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    return get_layers_from_vllm_config(vllm_config, Attention)


def no_tree_kernel(layers: dict[str, Attention], dtype: torch.dtype) -> Iterator[str]:
    """What each layer has that the tree kernel does not compute.

    Args:
        layers: by name.
        dtype: of the model.
    """
    for name, layer in layers.items():
        backend, cache = layer.attn_backend.get_name(), layer.kv_cache_dtype
        fp8 = cache in FP8_CACHES
        size, size_v = layer.head_size, layer.head_size_v
        found = {
            f"--attention-backend={backend}": backend not in BACKENDS,
            f"heads of {size} elements, more than 256": size > 256,
            f"K heads of {size} and V heads of {size_v} elements": size != size_v,
            f"--kv-cache-dtype={cache} for a model in {dtype}": not fp8
            and layer.kv_cache_torch_dtype != dtype,
            "K/V scales that differ by head": fp8
            and not layer._k_scale.numel() == layer._v_scale.numel() == 1,
        }
        yield from (f"{what} (layer {name})" for what, is_so in found.items() if is_so)
    head_sizes = {layer.head_size for layer in layers.values()}
    if len(head_sizes) > 1:
        yield f"heads of several sizes, {sorted(head_sizes)}"


def install_tree_attention(
    layers: dict[str, Attention],
    step: "StepTrees",
    device: torch.device,
) -> None:
    """Teach a model's attention layers, and theirs alone, to read trees.

    Args:
        layers: by name, in which `no_tree_kernel` found nothing.
        step: the trees of each step.
        device: of the model.
    """
    (head_size,) = {layer.head_size for layer in layers.values()}
    mixins: list[type] = [LoneAttention, TreeAttention]
    scratch = None
    if current_platform.is_cpu():
        mixins.append(TorchAttention)
    else:
        scratch = SplitScratch.allocate(head_size, device)
    _mix_in(layers, "Tree", *mixins, scratch=scratch)

    @cache
    def tree_backend(backend: type) -> type:
        inner = backend.get_builder_cls()  # type: ignore[attr-defined]
        names: dict[str, Any] = {"step": step}
        builder = type(f"Tree{inner.__name__}", (TreeMetadataBuilder, inner), names)
        names = {"get_builder_cls": staticmethod(lambda: builder)}
        return type(f"Tree{backend.__name__}", (backend,), names)

    for layer in layers.values():
        layer.impl.query_quant, layer.query_quant = layer.query_quant, None
        layer.attn_backend = tree_backend(layer.attn_backend)


class LoneAttention:
    """Mixed into a backend's implementation: it answers what `engine.bigrams` asks."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *scales: Any,
        **named_scales: Any,
    ) -> torch.Tensor:
        given = query, key, value, kv_cache, attn_metadata, output
        if isinstance(attn_metadata, LoneTokens):
            scale = self.scale  # type: ignore[attr-defined]
            return attn_metadata.attend(query, key, value, output, scale)
        forward = super().forward  # type: ignore[misc]
        return forward(layer, *given, *scales, **named_scales)


def answer_lone_tokens(layers: dict[str, Attention]) -> None:
    """Teach a model's attention layers the question that `engine.bigrams` asks."""
    _mix_in(layers, "Lone", LoneAttention)


def _mix_in(
    layers: dict[str, Attention], prefix: str, *mixins: type, **names: Any
) -> None:
    """Put classes before that of each layer's implementation, whose state stays."""

    @cache
    def mixed(impl: type) -> type:
        return type(f"{prefix}{impl.__name__}", (*mixins, impl), names)

    for layer in layers.values():
        impl = layer.impl
        layer.impl = object.__new__(mixed(impl.__class__))
        vars(layer.impl).update(vars(impl))


def slot_views(layers: dict[str, Attention]) -> list[torch.Tensor]:
    """Each cache as [num_blocks, block_size, num_kv_heads, 2 * head_size]."""
    owners = layers.values()
    caches = [x.kv_cache for x in owners if x.kv_sharing_target_layer_name is None]
    return [cache.transpose(1, 2) for cache in caches]
