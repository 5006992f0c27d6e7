# SPDX-License-Identifier: Apache-2.0
"""What a layer does with its cache where trees branch."""

import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.v1.test_tree_attention import BRANCHES, make_case
from vllm_lookahead.engine.v1.attention import (
    TreeAttentionImpl,
    kv_views,
    masked_attention,
)
from vllm_lookahead.numba_kernels.attention import tree_attention


def make_layer(kind: type, **options: Any) -> Any:
    config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    name = "vllm.v1.attention.backends.cpu_attn.get_current_vllm_config"
    with mock.patch(name, lambda: config):
        return kind(4, 64, 64**-0.5, 2, None, None, **options)


class Largest(TorchDispatchMode):
    """The most elements of any tensor of floats that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
                self.elements = max(self.elements, made.numel())
        return result


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e5m2"])
def test_fp8_blocks_of_a_tree_are_converted_and_no_others(dtype: str) -> None:
    case = make_case([BRANCHES], [90], dtype=torch.float32)
    kind = torch.float8_e4m3fn if dtype == "fp8" else torch.float8_e5m2
    used = case.cache.nan_to_num(0.0).to(kind)
    cache = torch.cat(
        [used.view(torch.uint8), torch.zeros(500, *used.shape[1:]).byte()]
    )
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    impl = make_layer(TreeAttentionImpl, kv_cache_dtype=dtype)
    expected, out = torch.zeros_like(case.query), torch.zeros_like(case.query)
    keys, values = kv_views(used.float())
    masked_attention(
        case.query, keys * 0.5, values * 2.0, case.trees, case.scale, 0.0, expected
    )
    with Largest() as largest:
        impl._attend_trees(layer, case.query, cache, case.trees, out)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    assert largest.elements < used.numel()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("kv_cache", (9, 2, 24, 128)),
        ("kv_cache", (9, 3, 32, 128)),
        ("kv_cache", (9, 2, 32, 96)),
        ("query", (6, 4, 40)),
        ("out", (5, 4, 64)),
    ],
)
def test_shapes_that_would_leave_the_tensors(name: str, shape: tuple[int, ...]) -> None:
    shapes = {"query": (6, 4, 64), "kv_cache": (9, 2, 32, 128), "out": (6, 4, 64)}
    tensors = {k: torch.zeros(v) for k, v in (shapes | {name: shape}).items()}
    trees = make_case([BRANCHES], [10]).trees
    words = re.escape(f"{name} {[*shape]}")
    with pytest.raises(ValueError, match=f"multiples of 16 .*{words}"):
        tree_attention(**tensors, trees=trees, scale=1.0)


def test_a_cache_that_the_kernel_cannot_read() -> None:
    query, cache = torch.zeros(6, 4, 64), torch.zeros(9, 2, 32, 128)
    trees = make_case([BRANCHES], [10]).trees
    for wrong in (cache[::2], cache.double()):
        words = f"expected a contiguous K/V cache .* got {wrong.dtype} with strides"
        with pytest.raises(TypeError, match=words):
            tree_attention(query, wrong, trees, 1.0, torch.zeros_like(query))
