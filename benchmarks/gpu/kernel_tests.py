# SPDX-License-Identifier: Apache-2.0
"""The kernels' tests on this machine's GPU, with the outcomes as JSON.

    python -m benchmarks.gpu.kernel_tests --out kernel-tests.json

Exits with an error if they could not be run; failures are in the JSON. With `--resume`
tests that passed, by the same JSON, are not run again.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("pytest", "hypothesis")
PASSED = "LOOKAHEAD_PASSED_TESTS"  # names a file of test ids, in JSON
TESTS = ["tests/kernels"]
WITHOUT_A_GPU = ["test_aot_compile.py", "test_attention_aot.py"]
PROCESSES = 6  # compiling takes longer than running


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what passed before; in each of pytest's processes."""
    if PASSED not in os.environ:
        return
    passed = set(json.loads(Path(os.environ[PASSED]).read_text())["passed"])
    known = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=known)
    items[:] = [item for item in items if item.nodeid not in passed]


class Outcomes:
    """A pytest plugin that writes what is known after every test."""

    def __init__(self, out: Path, passed: list[str]) -> None:
        self.out = out
        self.passed = passed
        self.counts: Counter[str] = Counter({"passed": len(passed)} if passed else {})
        self.failures: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed or report.skipped:
            self._add(report)

    def _add(self, report: Any) -> None:
        self.counts[report.outcome] += 1
        if report.passed:
            self.passed.append(report.nodeid)
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext[-3000:]
        elif report.skipped:
            self.skipped[report.nodeid] = str(report.longrepr)[-200:]
        self.save()

    def save(self) -> None:
        result = {
            "counts": dict(self.counts),
            "failures": self.failures,
            "skipped": self.skipped,
            "passed": self.passed,
        }
        self.out.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--resume", action="store_true", help="not what passed before")
    args = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise SystemExit(f"the tests need it: pip install {' '.join(missing)}")
    import pytest

    options = ["--quiet", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-p", "benchmarks.gpu.kernel_tests"]
    options += [f"--ignore-glob=*/{name}" for name in WITHOUT_A_GPU]
    if find_spec("xdist"):
        options += ["-n", str(PROCESSES)]
    passed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.resume and args.out.exists():
            known = Path(folder) / "known.json"
            shutil.copyfile(args.out, known)
            passed = json.loads(known.read_text())["passed"]
            os.environ[PASSED] = str(known)
        outcomes = Outcomes(args.out, passed)
        status = pytest.main([*options, *args.tests], plugins=[outcomes])
        outcomes.save()
    done = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    done |= bool(passed) and status == pytest.ExitCode.NO_TESTS_COLLECTED
    return 0 if done else int(status)


if __name__ == "__main__":
    raise SystemExit(main())
