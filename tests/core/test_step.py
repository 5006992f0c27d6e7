# SPDX-License-Identifier: Apache-2.0
"""The documents show the step as it is in the code."""

import inspect
from pathlib import Path

import pytest

from vllm_lookahead.core.step import step

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["README.md", "docs/step.md"])
def test_documents_show_the_step(document: str) -> None:
    _, _, body = inspect.getsource(step).rpartition('"""\n')
    assert body.startswith("    ops.write_tokens(") and body.endswith("verdict\n")
    assert body in (ROOT / document).read_text()
