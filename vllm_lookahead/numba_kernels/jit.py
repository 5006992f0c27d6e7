# SPDX-License-Identifier: Apache-2.0
"""How the CPU kernels are compiled.

Numba's disk cache notices a change of the file that a kernel is in, and of no
other: a kernel calls only kernels of its own file.
"""

from collections.abc import Callable
from typing import Any

from numba import njit

# numpy's error model: no check for division by zero.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on the first call, once per process and, where possible, machine."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither this folder nor a home folder can be written
        return njit(**_OPTIONS)(function)
