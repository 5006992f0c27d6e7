# SPDX-License-Identifier: Apache-2.0
"""Plain and lookahead engines in child processes, for a test session."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.environment import HERE

MODEL = [0, 2]  # seed, K/V heads


class Child:
    """A process that runs engines, one at a time, and keeps the last."""

    def __init__(self, models: Path, log: Path, env: dict[str, str]) -> None:
        read, write = os.pipe()
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), str(write), str(models)],
            stdin=subprocess.PIPE,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            pass_fds=[write],
            env=env,
            text=True,
        )
        os.close(write)
        self.results = os.fdopen(read)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.results.readline()
        result = json.loads(line) if line else {"error": "the process died"}
        if "error" in result:
            pytest.fail(f"{result['error']}\n{self.log.read_text()[-6000:]}")
        return result

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self) -> None:
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Engines:
    """Plain and lookahead engines, a process each; only one works at a time."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.children: dict[bool, Child] = {}
        self.known: dict[str, dict[str, Any]] = {}

    def run(
        self,
        batches: list[list[dict[str, Any]]],
        lookahead: dict[str, Any] | None = None,
        *,
        model: list[int] = MODEL,
        watch: bool | str = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Run batches one after the other.

        Args:
            batches: lists of {"prompt": token ids, "params": SamplingParams}.
            lookahead: sizes, or None for plain decoding.
            model: arguments of `make_model`.
            watch: every step, for what makes a GPU's host wait; "trees", to count
                those that the V1 runner drafts; "corpus", for what is read of others.
            options: of `LLM`.
        """
        job: dict[str, Any] = {"model": model, "engine": options, "batches": batches}
        sizes = None if lookahead is None else {"method": "lookahead", **lookahead}
        job["lookahead"] = sizes
        job["watch"] = watch
        plain = lookahead is None
        key = json.dumps(job)
        if plain and key in self.known:
            return self.known[key]
        if plain not in self.children:
            name = "plain" if plain else "lookahead"
            log = self.folder / f"{name}.log"
            self.children[plain] = Child(self.folder / name, log, self.env)
        result = self.children[plain].run(job)
        if plain:
            self.known[key] = result
        return result

    def close(self) -> None:
        for child in self.children.values():
            child.end()
        for child in self.children.values():
            child.wait()


def serve_engines(folder: Path, env: dict[str, str]) -> Iterator[Engines]:
    engines = Engines(folder, env)
    yield engines
    engines.close()
