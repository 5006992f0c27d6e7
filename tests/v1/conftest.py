# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.harness.engines import Engines, serve_engines
from tests.harness.environment import v1_environment

pytest.importorskip("vllm")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of the V1 runner, without Triton: what a CPU serves with."""
    yield from serve_engines(tmp_path_factory.mktemp("cpu"), v1_environment())
