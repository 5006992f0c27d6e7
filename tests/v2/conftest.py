# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.harness.engines import Engines, serve_engines
from tests.harness.environment import v1_environment, v2_environment

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """The V2 engine on the oracles of its kernels: the engine alone is under test."""
    env = v2_environment(LOOKAHEAD_ORACLES="1")
    yield from serve_engines(tmp_path_factory.mktemp("v2"), env)


@pytest.fixture(scope="session")
def kernels(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """The V2 engine as it is, on Triton kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    yield from serve_engines(folder, v2_environment(), engines)


@pytest.fixture(scope="session")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of the V1 runner, without Triton."""
    yield from serve_engines(tmp_path_factory.mktemp("v1"), v1_environment())
