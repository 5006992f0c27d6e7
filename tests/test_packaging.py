# SPDX-License-Identifier: Apache-2.0
"""Nobody finds a top-level module `triton_kernels`, however this is installed."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from vllm.utils import import_utils

ROOT = Path(__file__).parent.parent
KERNELS = "vllm_lookahead.triton_kernels"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because a build leaves files behind."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("vllm_lookahead", "triton_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


def build(project: Path, hook: str, site: Path) -> None:
    """Build a wheel and unpack it into a site folder."""
    code = f"import setuptools.build_meta as b; b.{hook}({str(site)!r})"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def installed(
    request: pytest.FixtureRequest,
    project: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A site folder with the package in it, and nothing else."""
    site = tmp_path_factory.mktemp(request.param)
    build(project, request.param, site)
    return site


def run(site: Path, code: str, *path: Path) -> str:
    """Run code with `site` for site-packages, and with folders before it."""
    setup = (
        f"import site, sys; sys.path[:0] = {[str(p) for p in path]};"
        f"site.addsitedir({str(site)!r});"
    )
    command = [sys.executable, "-I", "-S", "-c", setup + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_kernels_are_a_subpackage(installed: Path) -> None:
    find = "from importlib.util import find_spec;"
    print_both = f"print(find_spec('triton_kernels'), bool(find_spec('{KERNELS}')))"
    assert run(installed, find + print_both) == "None True"


def test_the_wheel_has_every_module(project: Path, tmp_path: Path) -> None:
    build(project, "build_wheel", tmp_path)
    expected = set()
    folders = {"vllm_lookahead": "vllm_lookahead", "triton_kernels": KERNELS}
    for folder, package in folders.items():
        for path in (project / folder).rglob("*.py"):
            inside = path.relative_to(project / folder).as_posix()
            expected.add(f"{package.replace('.', '/')}/{inside}")
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.py")}
    assert found == expected


def test_version_and_entry_point(installed: Path) -> None:
    code = (
        "import vllm_lookahead; from importlib.metadata import entry_points;"
        "(e,) = entry_points(group='vllm.general_plugins');"
        "print(vllm_lookahead.__version__, e.name, e.load().__qualname__)"
    )
    assert run(installed, code) == "0.1.0 lookahead register"


def test_the_repository_on_the_path_does_not_give_it_away(
    installed: Path, project: Path
) -> None:
    code = (
        "\ntry:\n    import triton_kernels\n"
        "except ModuleNotFoundError as error:\n    print(error.name)"
    )
    assert run(installed, code, project) == "triton_kernels"


HAS_TRITON_KERNELS = """
import sys
from vllm.utils import import_utils

print(import_utils.has_triton_kernels(), "triton_kernels" in sys.modules)
"""


def test_vllm_finds_no_triton_kernels_in_the_installed_package(
    installed: Path, project: Path
) -> None:
    """vLLM's own packages beside ours, and the repository before both."""
    (vllm,) = importlib.import_module("vllm").__path__
    site = str(Path(vllm).parent)
    # Without its .pth files, of which one is this checkout's own installation.
    code = f"sys.path.append({site!r})\n{HAS_TRITON_KERNELS}"
    assert run(installed, code, project).splitlines()[-1] == "False False"


def test_has_triton_kernels_as_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> tuple[bool, bool]:
        import_utils._has_module.cache_clear()
        import_utils.import_triton_kernels.cache_clear()
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "triton_kernels", raising=False)
        return import_utils.has_triton_kernels(), "triton_kernels" in sys.modules

    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with_us = ask()
    without = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", without)
    finders = [f for f in sys.meta_path if "vllm_lookahead" not in f.__module__]
    monkeypatch.setattr(sys, "meta_path", finders)
    assert with_us == ask()
    import_utils._has_module.cache_clear()
