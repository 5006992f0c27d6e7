# SPDX-License-Identifier: Apache-2.0
"""Packages for a GPU host without network: parts are put together again."""

import lzma
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu.host import ROOT

SCRIPTS = ROOT / "benchmarks" / "gpu"
PRINT = "&& python3 -c 'import packed; print(packed.x)' && env | grep FLASHINFER"


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A module in three parts."""
    tree, folder = tmp_path / "tree", tmp_path / "parts"
    tree.mkdir()
    folder.mkdir()
    (tree / "packed.py").write_text("x = 73\n")
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tree, ".")
    data = lzma.compress((tmp_path / "all.tar").read_bytes())
    third = -(-len(data) // 3)
    for i in range(3):
        (folder / f"part-0{i}").write_bytes(data[i * third : (i + 1) * third])
    return folder


def unpack(parts: Path, site: Path, then: str = "") -> subprocess.CompletedProcess:
    command = f"source {SCRIPTS}/unpack.sh {parts} {site} {then}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


def test_unpack(parts, tmp_path):
    site = tmp_path / "site"
    done = unpack(parts, site, PRINT)
    assert done.stdout.splitlines() == ["73", "VLLM_USE_FLASHINFER_SAMPLER=0"]
    for part in parts.iterdir():  # it is not unpacked again
        part.unlink()
    assert unpack(parts, site, PRINT).stdout == done.stdout


@pytest.mark.parametrize("number", range(3))
def test_a_part_is_missing(number, parts, tmp_path):
    (parts / f"part-0{number}").unlink()
    done = unpack(parts, tmp_path / "site")
    assert done.returncode
    assert f"PARTS_DIR {parts}: could not unpack it" in done.stderr


def test_pack_refuses(parts, monkeypatch):
    def pack(*options: str) -> str:
        command = [str(SCRIPTS / "pack.sh"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode
        return done.stderr

    assert "usage: pack.sh OUT_DIR" in pack()
    assert "MIB_PER_PART 4.5: give a whole number" in pack(str(parts), "4.5")
    assert f"OUT_DIR {parts}: it holds parts already" in pack(str(parts))
    monkeypatch.setenv("VLLM_VERSION", "0.32.0")
    assert "it holds parts already" in pack(str(parts))
    monkeypatch.setenv("VLLM_VERSION", "0.33.0")
    assert "VLLM_VERSION 0.33.0: what is packed besides" in pack(str(parts))
