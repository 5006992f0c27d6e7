# SPDX-License-Identifier: Apache-2.0
import signal

import pytest

from benchmarks import engine_process
from benchmarks.engine_process import EngineProcess, cause

STARTS_AND_DIES = """
import os, sys
print("ValueError: no room", flush=True)
os.write(int(sys.argv[1]), b"{}\\n")
sys.stdin.read()
"""
# As vLLM leaves them: of an engine core in a process of its own, and of options that
# are refused.
CORE = """
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:9]     raise ValueError(
(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:9] ValueError: no room for a block
RuntimeError: Engine core initialization failed. See root cause above. Failed: {}
resource_tracker.py:254: UserWarning: There appear to be 1 leaked objects
  warnings.warn('There appear to be %d '
"""
REFUSED = """
pydantic_core._pydantic_core.ValidationError: 1 validation error for SpeculativeConfig
method
  Input should be 'ngram' or 'medusa'
    For further information visit https://errors.pydantic.dev
"""


def test_an_engine_that_does_not_start(tmp_path):
    with pytest.raises(RuntimeError, match="did not start in 0"):
        EngineProcess({"model": "none"}, tmp_path / "log", start_limit=0.1)


def test_an_engine_that_died_while_it_waited(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(STARTS_AND_DIES)
    monkeypatch.setattr(engine_process, "__file__", str(program))
    engine = EngineProcess({}, tmp_path / "log")
    engine.process.send_signal(signal.SIGKILL)
    engine.process.wait()
    with pytest.raises(RuntimeError, match="the engine died:\n") as error:
        engine.run({"prompts": []})
    assert str(error.value).splitlines()[-1] == "ValueError: no room"
    engine.close()


@pytest.mark.parametrize(
    "log, expected",
    [
        (CORE, "ValueError: no room for a block"),
        ("x\nAssertionError\n", "AssertionError"),
        ("CUDA is gone\n\n", "CUDA is gone"),
        ("", "it said nothing"),
    ],
)
def test_what_an_engine_died_of(log, expected):
    assert cause(log) == expected


def test_what_was_refused_is_in_the_cause():
    assert cause(REFUSED).endswith(
        "for SpeculativeConfig method Input should be 'ngram' or 'medusa'"
    )
