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

# Bytes of NaN as a float of any size; as an integer a large number, for -1 is EMPTY.
FLOAT, INTEGER = 0xFF, 0x5A


@contextmanager
def poisoned(plausible: bool = False) -> Iterator[None]:
    """Kernels and `torch.empty` find garbage wherever nothing was written.

    That is NaN for floats; for integers 0x5A.. in a masked load, the largest one in new
    memory.

    Args:
        plausible: a lane that is masked out holds its own number instead, which may
            pass for a kind, a depth or an index.
    """
    load = InterpreterBuilder.create_masked_load

    def poisoned_load(
        builder: Any, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if other is None and not mask.data.all():
            dtype = ptrs.get_element_ty()
            byte = FLOAT if dtype.is_floating() else INTEGER
            one = _get_np_dtype(dtype)
            garbage = np.full(one.itemsize, byte, np.uint8).view(one)
            shape = ptrs.data.shape
            data = np.full(shape, garbage)
            if plausible and not dtype.is_floating():
                data = np.arange(data.size).astype(one).reshape(shape)
            other = TensorHandle(data, dtype)
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
