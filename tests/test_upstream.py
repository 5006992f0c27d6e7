# SPDX-License-Identifier: Apache-2.0
"""What lookahead takes from vLLM is what it was when that version was last read.

A failure names the seams that moved. Read each in the new vLLM; mend what relied on it;
then record them: `python -m tests.harness.upstream FOLDER`.
"""

import json
from pathlib import Path

import pytest
import vllm

from tests.harness import upstream
from vllm_lookahead.engine import patches


def test_the_installed_vllm_has_been_read() -> None:
    version, prints = upstream.fingerprints(Path(vllm.__file__).parents[1])
    record = json.loads(upstream.RECORD.read_text())
    known = [v for v in record if v.split(".")[:2] == version.split(".")[:2]]
    assert known, f"vLLM {version} has not been read"
    nearest = version if version in record else max(known)
    taken = set(upstream.taken())
    wanted = {s: p for s, p in record[nearest].items() if s in taken}
    assert upstream.moved(wanted, prints) == []


def test_every_version_that_runs_lookahead_has_been_read() -> None:
    read = {tuple(map(int, v.split(".")[:2])) for v in json.loads(
        upstream.RECORD.read_text())}  # fmt: skip
    (major, first), (_, end) = patches.SUPPORTED
    assert read == {(major, minor) for minor in range(first, end)}


def write(folder: Path, **modules: str) -> None:
    package = folder / "vllm"
    package.mkdir(exist_ok=True)
    (package / "_version.py").write_text("__version__ = version = '9.8.7'\n")
    (package / "__init__.py").touch()
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)


BASE = "class Base:\n    def f(self, x):\n        return x\n"


@pytest.mark.parametrize(
    ("base", "seams"),
    [
        (BASE, []),
        ("# why\n" + BASE.replace("return", '"""What."""\n        return'), []),
        (BASE.replace("return x", "return -x"), ["vllm.a:B.f: its code changed"]),
        (
            BASE.replace("x):", "x, y=0):"),
            ["vllm.a:B.f: (self, x) became (self, x, y=0)"],
        ),
        (BASE.replace("def f", "def g"), ["vllm.a:B.f: gone"]),
        (BASE.replace("Base", "Other"), ["vllm.a:B.f: gone"]),
    ],
)
def test_a_seam_that_moves_is_named(
    base: str, seams: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through an import and an inherited method; comments and docstrings are free."""
    monkeypatch.setattr(upstream, "taken", lambda: ["vllm.a:B", "vllm.a:B.f"])
    user = "from vllm.b import Base\n\nclass B(Base):\n    size = 3\n"
    write(tmp_path, a=user, b=BASE)
    version, before = upstream.fingerprints(tmp_path)
    assert version == "9.8.7" and before["vllm.a:B.f"][0] == "self, x"
    write(tmp_path, b=base)
    assert upstream.moved(before, upstream.fingerprints(tmp_path)[1]) == seams


ABSTRACT = """
class B:
    size = 3
    @abstractmethod
    def get(self): ...
"""


def test_a_class_that_gains_an_abstract_method_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "taken", lambda: ["vllm.a:B"])
    write(tmp_path, a=ABSTRACT)
    _, before = upstream.fingerprints(tmp_path)
    write(tmp_path, a=ABSTRACT.replace("...", "return 1"))  # code, and no signature
    assert upstream.moved(before, upstream.fingerprints(tmp_path)[1]) == []
    more = "    @abstractmethod\n    def get_more(self): ...\n"
    write(tmp_path, a=ABSTRACT + more)
    moved = upstream.moved(before, upstream.fingerprints(tmp_path)[1])
    assert moved == ["vllm.a:B: its code changed"]


def test_the_versions_differ_where_one_broke_the_other() -> None:
    """vLLM 0.33 gave asynchronous outputs a method that every one must have."""
    record = json.loads(upstream.RECORD.read_text())
    name = "vllm.v1.outputs:AsyncModelRunnerOutput"
    assert record["0.32.0"][name] != record["0.33.0"][name]


def test_imports_subclasses_patches_and_calls_are_taken() -> None:
    """Of each kind one that lookahead could not run without."""
    taken = upstream.taken()
    for symbol in (
        "vllm.v1.worker.gpu.sample.logprob:compute_topk_scores",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn",
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        "vllm.v1.worker.gpu.sample.sampler:Sampler.sample",
    ):
        assert symbol in taken
