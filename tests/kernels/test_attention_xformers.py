# SPDX-License-Identifier: Apache-2.0
"""Tree attention against xformers' with a bias, where both run on a GPU."""

import pytest
import torch

from benchmarks.gpu.attention import Problem, Shape, ours, xformers

pytest.importorskip("xformers.ops")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
@pytest.mark.parametrize("context", [1, 63, 1000])
def test_same_as_xformers(context, heads, dtype):
    torch.manual_seed(context)
    hq, hkv = heads
    problem = Problem(Shape(120, context, hq, hkv, requests=2, dtype=dtype), "cuda")
    close = 2e-2 if dtype == "bfloat16" else 4e-3
    expected = xformers(problem)()
    torch.testing.assert_close(ours(problem)(), expected, rtol=close, atol=close)
