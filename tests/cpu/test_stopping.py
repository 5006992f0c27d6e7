# SPDX-License-Identifier: Apache-2.0
"""Wherever in an accepted n-gram generation ends, it ends as plain vLLM's does."""

import json
from pathlib import Path

import pytest

from tests.cpu.test_lossless import TREE
from tests.harness.engines import Engines
from tests.harness.jobs import ACCEPTED, prompts, request, same_as_plain

EOS = 1
# A period of five tokens that no model of the tests leaves soon.
LOOP = [20, 21, 22, 23, 24] * 8


def loops(engines: Engines) -> list[list[int]]:
    """Prompts whose greedy continuation accepts whole n-grams."""
    texts = [LOOP, *prompts(3, seed=31)]
    result = engines.run([[request(t, max_tokens=60)] for t in texts], TREE)
    assert result["metrics"][ACCEPTED] > 60
    return [t + o["tokens"][:30] for t, o in zip(texts, result["outputs"], strict=True)]


def test_max_tokens_at_each_index(engines: Engines) -> None:
    jobs = [[request(t, max_tokens=n) for n in range(1, 13)] for t in loops(engines)]
    result = same_as_plain(engines, jobs, TREE)
    assert [len(o["tokens"]) for o in result["outputs"][:12]] == list(range(1, 13))


def test_stop_token_at_each_index(engines: Engines) -> None:
    jobs = []
    for text in loops(engines):
        ahead = engines.run([[request(text)]])["outputs"][0]["tokens"]
        jobs.append([request(text, stop_token_ids=[t]) for t in ahead])
        jobs.append([request(text, stop_token_ids=[t, 3], min_tokens=4) for t in ahead])
    same_as_plain(engines, jobs, TREE)


def test_second_eos_id(engines: Engines, tmp_path: Path) -> None:
    """Every id of a list of EOS ids ends a request, and none under ignore_eos."""
    text = loops(engines)[0]
    ahead = engines.run([[request(text)]])["outputs"][0]["tokens"]
    for eos in ([EOS, ahead[2]], [ahead[3], EOS]):
        job = [[request(text, ignore_eos=False), request(text, ignore_eos=True)]]
        folder = tmp_path / str(eos[0])
        folder.mkdir()
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": eos})
        )
        result = same_as_plain(engines, job, TREE, generation_config=str(folder))
        ended, ignored = result["outputs"]
        assert ended["reason"] == "stop"
        assert len(ended["tokens"]) <= 4
        assert ignored["reason"] == "length"


def test_stop_strings(engines: Engines) -> None:
    text = loops(engines)[0]
    ahead = engines.run([[request(text)]])["outputs"][0]["tokens"]
    letters = [chr(30 + t) for t in ahead if 32 <= 30 + t < 127]
    jobs = [[request(text, stop=["".join(letters[i : i + 2])]) for i in range(4)]]
    result = same_as_plain(engines, jobs, TREE)
    assert any(o["reason"] == "stop" for o in result["outputs"])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_short_prompts(engines: Engines, length: int) -> None:
    jobs = [[request([7 + i] * length, max_tokens=20)] for i in range(3)]
    same_as_plain(engines, jobs, TREE)
