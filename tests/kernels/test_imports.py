# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels stand on the core, and import each other in no circle.

The linter of imports does not see them: their folder has another name than their
package.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from vllm_lookahead import triton_kernels

FOLDER = Path(triton_kernels.__file__).parent
PREFIX = "vllm_lookahead."
KERNELS = f"{PREFIX}triton_kernels"


def imported(path: Path) -> set[str]:
    """Names of this package that a file imports, modules and what is in them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return {name for name in names if name.startswith(PREFIX)}


def test_kernels_stand_on_the_core() -> None:
    below = f"{PREFIX}core", f"{PREFIX}params", KERNELS
    for path in FOLDER.glob("*.py"):
        assert all(name.startswith(below) for name in imported(path)), path.name


def test_no_circle() -> None:
    modules = {f"{KERNELS}.{path.stem}": path for path in FOLDER.glob("*.py")}
    graph = {name: imported(path) & modules.keys() for name, path in modules.items()}
    assert len(graph) > 10 and any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError
