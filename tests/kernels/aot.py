# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for GPUs that are not here, and read what they cost.

A case is a call of a public launcher, `meta` tensors for its arguments. What the
launcher launches is compiled as Triton would compile it there (same constants,
same alignment hints, same warps) and nothing runs:

    def cases() -> dict[str, Callable[[], object]]: ...       # in a module
    for kernel in aot.compile_cases("tests.kernels.aot_cases", (80, 90, 100)):
        assert kernel.spill_bytes == 0

`compile_cases` works in a child process, for the interpreter cannot be switched
off once Triton is imported. From a shell:

    python -m tests.kernels.aot tests.kernels.aot_cases 90 [pattern of case names]
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel takes of an SM, as `cuobjdump --dump-resource-usage` says.

    Attributes:
        spill_bytes: local memory of a thread; what does not fit its registers.
        shared_bytes: shared memory of a block.
    """

    case: str
    kernel: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


def compile_cases(
    module: str, archs: Iterable[int], only: str = "", timeout: float = 900
) -> list[CompiledKernel]:
    """Compile every kernel that `module.cases()` launches, in a child process.

    Args:
        module: name of a module with `cases() -> {name: call of a launcher}`.
        archs: compute capabilities, 90 for sm_90.
        only: compile the cases in whose name this regular expression is found.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_INTERPRET"] = "0"
    command = [sys.executable, "-m", "tests.kernels.aot", "--json", module]
    command += [",".join(map(str, archs)), *([only] if only else [])]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-8000:]}")
    lines = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return [CompiledKernel(**json.loads(line)) for line in lines]


def compile_launches(
    case: str, launch: Callable[[], object], arch: int
) -> list[CompiledKernel]:
    """Compile what `launch` launches, once per specialization; run nothing.

    Only for a process in which Triton does not interpret.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", arch, 32)
    absent_gpu: Any = SimpleNamespace(
        get_current_device=lambda: arch,  # caches are per device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    run = JITFunction.run
    compiled = {}

    @functools.wraps(run)
    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel
        return kernel

    driver.set_active(absent_gpu)
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    if not compiled:
        raise RuntimeError(f"case {case} launched no Triton kernel")
    return [_resources(case, arch, kernel) for kernel in compiled.values()]


def _resources(case: str, arch: int, kernel: Any) -> CompiledKernel:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        listing = subprocess.check_output(tool, text=True)
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing))
    return CompiledKernel(
        case=case,
        kernel=kernel.name,
        arch=arch,
        registers=int(used["REG"]),
        spill_bytes=int(used["STACK"]) + int(used["LOCAL"]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
    )


def main(arguments: list[str]) -> None:
    as_json = "--json" in arguments
    module, archs, *only = [a for a in arguments if a != "--json"]
    for case, launch in importlib.import_module(module).cases().items():
        if only and not re.search(only[0], case):
            continue
        for arch in archs.split(","):
            for kernel in compile_launches(case, launch, int(arch)):
                if as_json:
                    print(json.dumps(asdict(kernel)), flush=True)
                    continue
                print(
                    f"{case:32} {kernel.kernel:28} sm_{arch:4}"
                    f"{kernel.registers:4} registers {kernel.spill_bytes:4} spilled "
                    f"{kernel.shared_bytes:6} shared {kernel.num_warps:2} warps",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
