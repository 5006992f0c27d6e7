# SPDX-License-Identifier: Apache-2.0
"""Every core test runs on every implementation of `LookaheadOps` listed here."""

from collections.abc import Iterator

import pytest
import torch

from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.step import LookaheadOps
from vllm_lookahead.numba_kernels.ops import NumbaOps

IMPLEMENTATIONS: dict[str, LookaheadOps] = {
    "reference": ReferenceOps(),
    "numba": NumbaOps(),
}
# Compared with the reference.
OTHERS = {n: ops for n, ops in IMPLEMENTATIONS.items() if n != "reference"}


@pytest.fixture(scope="session", params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> LookaheadOps:
    return request.param


@pytest.fixture(scope="session", params=OTHERS.values(), ids=OTHERS)
def other_ops(request: pytest.FixtureRequest) -> LookaheadOps:
    return request.param


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Small ops wait for OpenMP's threads longer than they run, on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
