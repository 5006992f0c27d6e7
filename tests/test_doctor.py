# SPDX-License-Identifier: Apache-2.0
"""What `python -m vllm_lookahead.doctor` says of a model's config."""

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.model_executor.models import registry

from tests.hf_config import write_config
from tests.test_config import CHAINS, KINDS
from vllm_lookahead import doctor

LATENT = CHAINS["latent attention (MLA)"]
RECURRENT = KINDS["recurrent state on a CPU"]


@pytest.mark.parametrize(
    ("changes", "code", "last"),
    [
        ({}, 0, "drafts: trees"),
        (
            LATENT,
            0,
            "drafts: one chain per step: this model has latent attention (MLA)",
        ),
        (RECURRENT, 1, "refused: lookahead does not support recurrent state on a CPU"),
    ],
)
def test_what_it_says(
    changes: dict[str, Any],
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    assert doctor.main([write_config(tmp_path, **changes)]) == code
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(("vLLM ", "engine: "))]
    assert said == [f"vLLM {vllm.__version__}", "engine: V1"]
    assert lines[-1].startswith(last)


def test_another_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    assert doctor.main(["anything"]) == 1
    assert "lookahead was not tested with vLLM 0.99.0" in capsys.readouterr().out
