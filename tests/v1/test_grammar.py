# SPDX-License-Identifier: Apache-2.0
"""Structured output: chains of drafts that the scheduler masks, on the V1 runner."""

import pytest

from tests.harness import grammars
from tests.harness.engines import Engines
from tests.harness.grammars import BACKENDS
from tests.v1.test_lossless import DEFAULT, FULL

CASES = grammars.cases(("xgrammar", True), ("guidance", False))


@pytest.mark.parametrize(("backend", "ahead"), CASES)
def test_kinds(engines: Engines, backend: str, ahead: bool) -> None:
    grammars.kinds_of_grammar(engines, backend, ahead)


@pytest.mark.parametrize(("backend", "ahead"), CASES)
def test_forced_text(engines: Engines, backend: str, ahead: bool) -> None:
    grammars.forced_text_is_drafted(engines, backend, ahead)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [FULL, DEFAULT], ids=["full", "default"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_at_other_sizes(
    engines: Engines, backend: str, ahead: bool, sizes: dict[str, int]
) -> None:
    grammars.kinds_of_grammar(engines, backend, ahead, sizes)


@pytest.mark.parametrize(
    "ahead", [True, pytest.param(False, marks=pytest.mark.slow)], ids=str
)
def test_reasoning(engines: Engines, ahead: bool) -> None:
    grammars.a_grammar_after_reasoning(engines, "xgrammar", ahead)
