# SPDX-License-Identifier: Apache-2.0
"""The kernels' tests on this machine's GPU, with the outcomes as JSON.

    python -m benchmarks.gpu.kernel_tests --out kernel-tests.json

Exits with an error if they could not be run; failures are in the JSON.
"""

import argparse
import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

TESTS = ["tests/kernels"]
WITHOUT_A_GPU = ["test_aot_compile.py", "test_attention_aot.py"]
PROCESSES = 6  # compiling takes longer than running


class Outcomes:
    """A pytest plugin that writes what is known after every test."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.counts: Counter[str] = Counter()
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
        }
        self.out.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("tests", nargs="*", default=TESTS)
    args = parser.parse_args(arguments)
    options = ["--quiet", "--tb=short", "-p", "no:cacheprovider"]
    options += [f"--ignore-glob=*/{name}" for name in WITHOUT_A_GPU]
    if find_spec("xdist"):
        options += ["-n", str(PROCESSES)]
    outcomes = Outcomes(args.out)
    status = pytest.main([*options, *args.tests], plugins=[outcomes])
    outcomes.save()
    done = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return 0 if done else int(status)


if __name__ == "__main__":
    raise SystemExit(main())
