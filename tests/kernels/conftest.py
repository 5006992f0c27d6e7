# SPDX-License-Identifier: Apache-2.0
"""Kernel tests: in the interpreter, or on the GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch
from triton import knobs

from tests.harness.poison import poisoned

if torch.cuda.is_available() == knobs.runtime.interpret:
    raise RuntimeError(
        "Triton must interpret without a GPU and compile with one: run pytest from "
        "the repository's root, without TRITON_INTERPRET"
    )


@pytest.fixture(autouse=True)
def on_the_kernels_device() -> Iterator[None]:
    """Tensors are made on the GPU, if any, and what it leaves undefined is garbage."""
    if not torch.cuda.is_available():
        with poisoned():
            yield
        return
    with torch.device("cuda"):
        yield
