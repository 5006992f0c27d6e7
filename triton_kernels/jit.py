# SPDX-License-Identifier: Apache-2.0
"""How the kernels of a step are compiled."""

import inspect
from collections.abc import Callable
from typing import Any

import triton


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, but one binary whatever the size of the batch.

    Counts follow it, and many pointers point into the middle of a buffer, aligned
    or not. A server must not stop to compile when a third request joins. Strides
    are those of a server's buffers, and specialized.
    """
    names = list(inspect.signature(kernel).parameters)
    variables = [n for n in names if n.islower() and not n.startswith("stride_")]
    return triton.jit(
        kernel,
        do_not_specialize=[n for n in variables if not n.endswith("_ptr")],
        do_not_specialize_on_alignment=[n for n in variables if n.endswith("_ptr")],
    )
