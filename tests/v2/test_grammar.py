# SPDX-License-Identifier: Apache-2.0
"""Structured output: chains of drafts that the scheduler masks, on the V2 runner."""

import pytest

from tests.harness import grammars
from tests.harness.engines import Engines

CASES = [("xgrammar", True)]
OTHERS = [("xgrammar", False), ("guidance", False), ("guidance", True)]
CASES = [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS)]


@pytest.mark.parametrize(("backend", "ahead"), CASES)
def test_kinds(engines: Engines, backend: str, ahead: bool) -> None:
    grammars.kinds_of_grammar(engines, backend, ahead)


@pytest.mark.parametrize(("backend", "ahead"), CASES)
def test_forced_text(engines: Engines, backend: str, ahead: bool) -> None:
    grammars.forced_text_is_drafted(engines, backend, ahead)


@pytest.mark.parametrize(
    "ahead", [True, pytest.param(False, marks=pytest.mark.slow)], ids=str
)
def test_reasoning(engines: Engines, ahead: bool) -> None:
    grammars.a_grammar_after_reasoning(engines, "xgrammar", ahead)
