# SPDX-License-Identifier: Apache-2.0
"""Memory that a GPU leaves undefined holds garbage under Triton's interpreter, too.

By itself the interpreter reads zeros where a load is masked out and has no `other`, and
new memory on a CPU is often zero. A kernel that needs either passes there, and fails on
a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime.interpreter import (
    InterpreterBuilder,
    TensorHandle,
    _get_np_dtype,
)

# Bytes of a large integer: as an index out of reach, as a token nobody's.
LARGE = 0x5A


def draw_garbage(draw: np.random.Generator, shape: Any, dtype: np.dtype) -> np.ndarray:
    """Integers that are large, or may pass for a lane, a kind, a depth or EMPTY."""
    size = int(np.prod(shape))
    large = np.full(dtype.itemsize, LARGE, np.uint8).view(dtype)
    kinds = [
        np.full(size, large),
        np.arange(size).astype(dtype),
        draw.integers(-1, 5, size).astype(dtype),
    ]
    return np.choose(draw.integers(0, len(kinds), size), kinds).reshape(shape)


@contextmanager
def poisoned(seed: int = 0) -> Iterator[None]:
    """Kernels and `torch.empty` find garbage wherever nothing was written.

    That is NaN for floats; for integers in a masked load whatever `draw_garbage` gives,
    in new memory the largest one.
    """
    load, draw = InterpreterBuilder.create_masked_load, np.random.default_rng(seed)

    def poisoned_load(
        builder: Any, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if other is None and not mask.data.all():
            dtype, shape = ptrs.get_element_ty(), ptrs.data.shape
            one = np.dtype(_get_np_dtype(dtype))
            if dtype.is_floating():
                garbage = np.full(one.itemsize, 0xFF, np.uint8).view(one)
                other = TensorHandle(np.full(shape, garbage), dtype)
            else:
                other = TensorHandle(draw_garbage(draw, shape, one), dtype)
        return load(builder, ptrs, mask, other, *args, **kwargs)

    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # PyTorch fills new memory in this mode, and warns of what it cannot order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    patch = mock.patch.object(InterpreterBuilder, "create_masked_load", poisoned_load)
    try:
        with patch:
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
