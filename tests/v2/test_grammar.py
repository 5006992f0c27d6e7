# SPDX-License-Identifier: Apache-2.0
"""Structured output: chains of drafts that the scheduler masks, on the V2 runner."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from tests.harness import grammars
from tests.harness.engines import Engines
from vllm_lookahead.engine.v2.grammar import apply_grammar

CASES = grammars.cases(("xgrammar", True))


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


def test_masks_of_chains_that_are_cut() -> None:
    """Each request's are found behind all that the scheduler made, not the fed ones."""
    batch = SimpleNamespace(
        req_ids=["a", "b", "free"],
        num_draft_tokens_per_req=np.array([2, 1, 5]),
        cu_num_logits_np=np.array([0, 3, 5, 11]),
    )
    made = SimpleNamespace(
        structured_output_request_ids=["b", "a"],
        grammar_bitmask=np.arange(9 + 4)[:, None],
    )
    taken: list[list[int]] = []

    class Worker:
        num_bonus_tokens = 1

        def apply_grammar_bitmask(self, logits, rows, ids, masks) -> None:
            assert ids == ["b", "a"]
            taken.append(masks[:, 0].tolist())

    scheduled = {"a": 3, "b": 8, "free": 8}
    apply: Any = apply_grammar
    apply(Worker(), None, batch, made, scheduled, 0, 3, None)
    assert taken == [[0, 1, 9, 10, 11]]
