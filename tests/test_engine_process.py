# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.engine_process import EngineProcess


def test_an_engine_that_does_not_start(tmp_path):
    with pytest.raises(RuntimeError, match="did not start in 0"):
        EngineProcess({"model": "none"}, tmp_path / "log", start_limit=0.1)
