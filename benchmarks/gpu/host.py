# SPDX-License-Identifier: Apache-2.0
"""The machine that is measured: what it has, what it lacks, how processes end on it."""

import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.commit import commit

ROOT = Path(__file__).resolve().parent.parent.parent
INSTALL = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."]
FINDS_PLUGIN = """
import importlib.metadata, sys
group = "vllm.general_plugins"
sys.exit(not importlib.metadata.entry_points(group=group, name="lookahead"))
"""
PROBE = """
import json, torch
found = {"gpu": None, "torch": torch.__version__, "flashinfer": True}
if torch.cuda.is_available():
    found["gpu"] = torch.cuda.get_device_name()
try:
    import flashinfer
except Exception:
    found["flashinfer"] = False
print(json.dumps(found))
"""
# {name: (value, why)}
Environment = dict[str, tuple[str, str]]
OFFLINE: Environment = {
    "HF_HUB_OFFLINE": ("1", "the models are local"),
    "VLLM_NO_USAGE_STATS": ("1", "nothing is reported"),
}
NO_FLASHINFER: Environment = {
    "VLLM_USE_FLASHINFER_SAMPLER": (
        "0",
        "flashinfer cannot be imported, and vLLM imports it for its sampler unguarded",
    )
}
IEEE: Environment = {
    "TRITON_F32_DEFAULT": (
        "ieee",
        "vLLM's Triton kernels would multiply float32 as TF32, and ours do not",
    )
}
READ = ("VLLM_", "TRITON_", "TORCH", "CUDA_", "PYTORCH_", "NVIDIA_TF32")


def installed() -> bool:
    """Whether an engine's process finds the plugin.

    This one may find metadata that only lies in the working directory, where a build
    left it. So another is asked, which has neither that nor a script's folder on its
    path (-P), but PYTHONPATH and the user's packages, as engines do.
    """
    ask = [sys.executable, "-P", "-c", FINDS_PLUGIN]
    return not subprocess.run(ask, cwd=ROOT).returncode


def install() -> None:
    """Install this checkout, if it is not: vLLM finds a plugin by its metadata.

    Raises:
        SystemExit: pip failed.
    """
    if installed():
        return
    command = [sys.executable, "-m", "pip", *INSTALL]
    print(f"vllm-lookahead is not installed: {shlex.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(
            "vllm-lookahead could not be installed; pip says why above. In an "
            "externally managed environment: make one with python -m venv "
            "--system-site-packages, and call again with its python. With setuptools "
            "older than 77: pip install --upgrade setuptools, and call again."
        )


def about() -> dict[str, Any]:
    """This machine and its software; in a process of its own, for CUDA's memory."""
    probe = [sys.executable, "-c", PROBE]
    output = subprocess.run(probe, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1]) if output else {}
    for name in ("triton", "vllm", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    python = ".".join(map(str, sys.version_info[:3]))
    return {**found, "python": python, "commit": commit()}


def environment(facts: dict[str, Any], own: Environment) -> Environment:
    """What a stage's process is given beside what this one was started with.

    Args:
        facts: of `about`.
        own: the stage's.
    """
    lacks_flashinfer = facts.get("flashinfer") is False
    return OFFLINE | (NO_FLASHINFER if lacks_flashinfer else {}) | own


def recorded(given: Environment) -> dict[str, dict[str, str]]:
    """For a record: what was given and why, and what else was set that matters."""
    known = {k: v for k, v in os.environ.items() if k.startswith(READ)}
    found = {k: {"value": v, "why": "set before"} for k, v in known.items()}
    return found | {k: {"value": v, "why": why} for k, (v, why) in given.items()}


def end(process: subprocess.Popen) -> None:
    """Kill a stage, the leader of a process group, and all that it started."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        return
    try:
        root = psutil.Process(process.pid)
        # Some have process groups of their own.
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)
