# SPDX-License-Identifier: Apache-2.0
"""Which attention layers are taught trees, and what vLLM's part of them is given."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm_lookahead.engine.v2 import attention

FP8 = torch.float8_e4m3fn


def quantize(rows: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, Any]:
    assert rows.dim() == 2
    return (rows / scale).to(FP8), scale


class Backend:
    name = "FLASH_ATTN"

    @classmethod
    def get_name(cls) -> str:
        return cls.name

    @staticmethod
    def get_builder_cls() -> type:
        return object


class Impl:
    """What a backend computes for plain rows: here, what it was given."""

    supports_quant_query_input = True
    scale = 0.5

    def __init__(self, logits_soft_cap: float | None = None) -> None:
        self.logits_soft_cap = logits_soft_cap
        self.calls: list[tuple[torch.Tensor, Any]] = []

    def forward(self, layer: Any, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.calls.append((query, rest[3]))
        return rest[4]


def make_layer(**changes: Any) -> Any:
    layer = SimpleNamespace(
        impl=Impl(),
        attn_backend=Backend,
        kv_cache_dtype="fp8",
        kv_cache_torch_dtype=torch.uint8,
        head_size=32,
        head_size_v=32,
        sliding_window=None,
        query_quant=quantize,
        _q_scale=torch.tensor(2.0),
        _k_scale=torch.tensor(3.0),
        _v_scale=torch.tensor(5.0),
    )
    vars(layer).update(changes)
    return layer


def install(monkeypatch: pytest.MonkeyPatch, *layers: Any) -> None:
    named = {f"layer{i}": layer for i, layer in enumerate(layers)}
    # Without the CPU's stand-in for vLLM's kernel.
    monkeypatch.setattr(attention.current_platform, "is_cpu", lambda: False)
    scratch = SimpleNamespace(allocate=lambda *sizes: None)
    monkeypatch.setattr(attention, "SplitScratch", scratch)
    step: Any = None
    device = torch.device("cpu")
    assert not list(attention.no_tree_kernel(named, torch.bfloat16))
    attention.install_tree_attention(named, step, device)


@pytest.mark.parametrize("softcap", [None, 0, 30.0])
def test_fp8_queries_are_for_vllm_alone(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention wants queries of the cache's dtype; a tree has the model's."""
    layer = make_layer(impl=Impl(softcap))
    install(monkeypatch, layer)
    assert layer.query_quant is None and layer.impl.supports_quant_query_input
    seen: dict[str, Any] = {}

    def tree_attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> None:
        seen.update(named, q=q, k=k, v=v)

    monkeypatch.setattr(attention, "tree_attention", tree_attention)
    query = torch.randn(7, 4, 32).bfloat16()
    key = value = torch.zeros(7, 2, 32)
    cache = torch.zeros(3, 2, 16, 64, dtype=torch.uint8)
    trees: Any = None
    metadata = attention.TreeMetadata(trees, 5, rest := object())
    layer.impl.forward(layer, query, key, value, cache, metadata, query.clone())
    (plain, given), *more = layer.impl.calls
    assert given is rest and not more
    assert torch.equal(plain.float(), (query[5:] / 2).to(FP8).float())
    assert seen["q"].dtype == torch.bfloat16 and len(seen["q"]) == 5
    assert seen["k"].dtype == FP8 and seen["k"].shape == (3, 16, 2, 32)
    assert (seen["k_scale"].item(), seen["v_scale"].item()) == (3, 5)
    assert seen["softcap"] == (softcap or 0)

    layer.impl.forward(layer, query, key, value, cache, rest, query.clone())
    assert layer.impl.calls[1][0].dtype == FP8


class Unknown(Backend):
    name = "B12X"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_backend": Unknown}, "--attention-backend=B12X"),
        ({"head_size": 512, "head_size_v": 512}, "heads of 512 elements"),
        ({"head_size_v": 16}, "K heads of 32 and V heads of 16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype=fp8_e5m2 for .*bfloat16"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "int8_per_token_head"),
        ({"kv_cache_dtype": "nvfp4"}, "nvfp4"),
        (
            {"kv_cache_dtype": "float16", "kv_cache_torch_dtype": torch.float16},
            "--kv-cache-dtype=float16",
        ),
        ({"_k_scale": torch.ones(2)}, "K/V scales that differ by head"),
    ],
)
def test_layers_that_the_tree_kernel_does_not_compute(
    changes: dict, words: str
) -> None:
    layers = {"layer0": make_layer(), "layer1": make_layer(**changes)}
    found = attention.no_tree_kernel(layers, torch.bfloat16)
    assert re.search(rf"{words}.* \(layer layer1\)", next(found))


def test_layers_of_several_head_sizes() -> None:
    layers = {"a": make_layer(), "b": make_layer(head_size=64, head_size_v=64)}
    (found,) = attention.no_tree_kernel(layers, torch.bfloat16)
    assert found == "heads of several sizes, [32, 64]"


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_known_backends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type("Known", (Backend,), {"name": name})
    layer = make_layer(
        attn_backend=backend,
        kv_cache_dtype="auto",
        kv_cache_torch_dtype=torch.bfloat16,
        query_quant=None,
    )
    install(monkeypatch, layer)
    query = torch.zeros(2, 4, 32)
    layer.impl.forward(layer, query, query, query, query, None, query)
    assert layer.impl.calls[0][0] is query
