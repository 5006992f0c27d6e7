# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.harness.engines import Engines, serve_engines
from tests.harness.environment import v1_environment, v2_environment

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of the V2 runner, their Triton kernels interpreted."""
    yield from serve_engines(tmp_path_factory.mktemp("v2"), v2_environment())


@pytest.fixture(scope="session")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of the V1 runner, without Triton: what a CPU serves with."""
    yield from serve_engines(tmp_path_factory.mktemp("v1"), v1_environment())
