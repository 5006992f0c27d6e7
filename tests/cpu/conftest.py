# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.v2.conftest import Engines, serve_engines
from tests.v2.interpreter import environment


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """Engines of the V1 runner, without Triton: what a CPU serves with."""
    env = environment(VLLM_USE_V2_MODEL_RUNNER="0", TRITON_INTERPRET="0")
    del env["PYTHONPATH"]
    yield from serve_engines(tmp_path_factory.mktemp("cpu"), env)
