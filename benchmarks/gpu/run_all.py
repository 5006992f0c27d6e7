# SPDX-License-Identifier: Apache-2.0
"""Every measurement for a machine with one GPU, in order; call again to resume.

    python -m benchmarks.gpu.run_all --minutes 25

A stage is a process with a time limit of its own. What it wrote is kept whole in
OUTPUT/STAGE.json, its log in OUTPUT/logs; a stage that is there is not run again,
unless it failed. At the end the summary says of each target whether it was met.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.gpu.plot import attention_results, plot
from benchmarks.gpu.summary import SOURCES, build_summary

ROOT = Path(__file__).resolve().parent.parent.parent
LOOKAHEAD = "lookahead:15/5/15"
MODEL_BYTES = 14e9  # of the widened model
ENGINE = {"--dtype": "bfloat16", "--max-model-len": "1024"}
# A request of 1024 tokens has 0.5 GiB of K/V in a 7B model. Of the correctness stages
# 8 run at once, in one engine; of the speed stages one, in each of up to four engines
# that share 80 GB.
KV_BYTES = {"correctness": 6 << 30, "speed": 1 << 30}
GPU_SHARE = 0.24  # free when an engine starts
# Outputs of that many tokens, of whose trigrams this share is distinct, do not loop.
DISTINCT_TOKENS, DISTINCT = 64, ["--min-distinct", "0.6", "--keep", "16"]
LEAST_SECONDS = 30  # to start a stage with
OUT = "{out}"  # in a stage's command, the file that it writes


@dataclass(frozen=True)
class Stage:
    """A process that measures.

    Attributes:
        limit: seconds, generous.
        needs: what else must exist for the stage to be done.
    """

    name: str
    limit: int
    command: list[str]
    needs: Path | None = None


def all_stages(args: argparse.Namespace) -> list[Stage]:
    """The most valuable first, as far as one may come before what it needs."""

    def module(name: str, *options: str, out: str = "--out") -> list[str]:
        return [sys.executable, "-m", f"benchmarks.gpu.{name}", *options, out, OUT]

    model = args.model or args.model_dir or default_model_dir()
    data = ["--dataset", args.dataset]
    if args.data_dir:
        data += ["--data-dir", args.data_dir]

    def engine(path: Path, kind: str) -> list[str]:
        options = [x for pair in ENGINE.items() for x in pair]
        options += ["--kv-cache-memory-bytes", str(KV_BYTES[kind])]
        return ["--model", str(path), *options, *data]

    def correctness(path: Path, *options: str) -> list[str]:
        options = (*engine(path, "correctness"), *options)
        options = ("--max-tokens", str(args.max_tokens), *options)
        return module("engine_correctness", *options, out="--output")

    def speed(
        program: list[str],
        methods: str,
        temperature: float,
        tokens: int = args.max_tokens,
    ) -> list[str]:
        command = [sys.executable, *program, *engine(model, "speed")]
        command += ["--methods", methods, "--temperature", str(temperature)]
        command += ["--max-tokens", str(tokens)]
        command += ["--gpu-memory-utilization", str(GPU_SHARE)]
        return [*command, "--start-limit", "180", "--output", OUT]

    fast = ["tree", "merged", "flash_causal", "unified_qq_bias", "xformers"]
    trees = ["--trees", "120", "64", "32", "16"]
    widest = ["--trees", "120", "--only", "attention"]
    stages = [
        Stage("kernel-tests", 480, module("kernel_tests")),
        Stage("kernel-times", 420, module("kernels", *trees, "--contenders", *fast)),
    ]
    if args.model is None:
        command = [sys.executable, "benchmarks/widen_model.py"]
        command += ["--source", str(args.source), "--output", str(model)]
        stages.append(Stage("model", 400, command, needs=model / "config.json"))
    offline, both = ["benchmarks/offline.py"], f"plain,{LOOKAHEAD}"
    distinct = ["-m", "benchmarks.gpu.engine_distinct", *DISTINCT]
    baselines = "plain,ngram_gpu,ngram,suffix"
    flex = module("kernels", *widest, "--contenders", "flash_causal", "flex")
    return [
        *stages,
        Stage("engine-correctness", 500, correctness(model)),
        Stage("engine-speed", 480, speed(offline, both, 0)),
        Stage("engine-distinct", 420, speed(distinct, both, 0, DISTINCT_TOKENS)),
        Stage("engine-baselines", 540, speed(offline, baselines, 0)),
        Stage("engine-sampled", 420, speed(offline, both, 0.8)),
        Stage("kernel-flex", 400, flex),
        Stage("engine-float32", 300, correctness(args.source, "--dtype", "float32")),
    ]


def default_model_dir() -> Path:
    """In memory, if there is room: a disk may take longer than the measurements."""
    name, memory = "lookahead-7b-cost", Path("/dev/shm")
    fits = memory.exists() and shutil.disk_usage(memory).free > 1.5 * MODEL_BYTES
    if fits or (memory / name).exists():
        return memory / name
    return Path(tempfile.gettempdir()) / name


def about() -> dict[str, Any]:
    """This machine and its software; in a process of its own, for CUDA's memory."""
    code = "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({"
    code += "'gpu': torch.cuda.get_device_name() if gpu else None, "
    code += "'torch': torch.__version__}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = json.loads(done.stdout or "{}")
    for name in ("triton", "vllm", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout
    except OSError:
        commit = ""
    python = ".".join(map(str, sys.version_info[:3]))
    return {**found, "python": python, "commit": commit.strip() or None}


def done(record: dict[str, Any], stage: Stage) -> bool:
    whole = record and "failed" not in record
    return bool(whole) and (stage.needs is None or stage.needs.exists())


def run_stage(
    stage: Stage, output: Path, seconds: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """Run to the end or the limit; write and return the record."""
    out, log = output / f"{stage.name}.raw", output / "logs" / f"{stage.name}.log"
    out.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(out) if part == OUT else part for part in stage.command]
    record: dict[str, Any] = {
        "stage": stage.name,
        "about": facts,
        "command": shlex.join(command),
    }
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            if status := process.wait(seconds):
                record["failed"] = f"exit status {status}"
        except subprocess.TimeoutExpired:
            end(process)
            record["failed"] = f"stopped after {seconds:.0f} s"
        except BaseException:
            end(process)
            raise
    record["seconds"] = time.monotonic() - start
    if stage.needs and not stage.needs.exists():
        record.setdefault("failed", f"{stage.needs} was not written")
    if OUT in stage.command:
        try:
            record["result"] = json.loads(out.read_text())
        except (OSError, ValueError):
            record.setdefault("failed", "it wrote no results")
    if "failed" in record:
        record["log"] = log.read_text(errors="replace").splitlines()[-30:]
    (output / f"{stage.name}.json").write_text(json.dumps(record) + "\n")
    out.unlink(missing_ok=True)
    return record


def end(process: subprocess.Popen) -> None:
    """Kill a stage and all that it started, some of it in sessions of its own."""
    import psutil  # type: ignore[import-untyped]

    try:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=20)


def read_records(output: Path) -> dict[str, dict[str, Any]]:
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(output.glob("*.json"))
    }


def run_stages(
    stages: list[Stage], args: argparse.Namespace, facts: dict[str, Any]
) -> None:
    deadline = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    before = read_records(args.output)
    for stage in stages:
        if not args.force and done(before.get(stage.name, {}), stage):
            print(f"{stage.name}: there already", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{stage.name}: no time is left; call again to go on", flush=True)
            continue
        seconds = min(stage.limit, left)
        print(f"{stage.name}: at most {seconds:.0f} s", flush=True)
        record = run_stage(stage, args.output, seconds, facts)
        print(f"{stage.name}: {record['seconds']:.0f} s", flush=True)
        if "failed" in record:
            print(f"{stage.name}: {record['failed']}", *record["log"], sep="\n  ")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, help="default: benchmarks/results/gpu-NAME")
    add("--name", help="of the results; default: the GPU's")
    add("--stages", metavar="A,B", help="only these")
    add("--force", action="store_true", help="also those that are there already")
    add("--dry-run", action="store_true", help="print the stages and their commands")
    add("--minutes", type=float, default=25, help="for all stages of this call")
    add("--model", type=Path, help="of the engine stages, instead of a widened one")
    add(
        "--source",
        type=Path,
        default=ROOT / "demo" / "model",
        help="the model to widen",
    )
    add("--model-dir", type=Path, help="where to write that, 14 GB, if it is missing")
    add("--dataset", default=str(ROOT / "benchmarks" / "python_prompts.jsonl"))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--max-tokens", type=int, default=128)
    add("--commit", help="of the code, where git does not know")
    add("--plot", type=Path, default=ROOT / "docs" / "kernel-times.svg")
    args = parser.parse_args(arguments)
    for name in ("output", "model", "source", "model_dir", "data_dir"):
        if path := getattr(args, name):
            setattr(args, name, type(path)(Path(path).absolute()))
    return args


def chosen(args: argparse.Namespace) -> list[Stage]:
    stages = all_stages(args)
    if not args.stages:
        return stages
    names = args.stages.split(",")
    if unknown := set(names) - {s.name for s in stages}:
        known = ", ".join(s.name for s in stages)
        raise SystemExit(f"--stages: no {', '.join(sorted(unknown))}; use {known}")
    return [s for s in stages if s.name in names]


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    stages = chosen(args)
    if args.dry_run:
        for stage in stages:
            print(f"{stage.name} (at most {stage.limit} s)")
            print(f"  {shlex.join(stage.command)}")
        return
    facts = about()
    facts["commit"] = args.commit or facts["commit"]
    if not facts.get("gpu"):
        raise SystemExit("no GPU; --dry-run prints the stages and their commands")
    if args.output is None:
        name = args.name or facts["gpu"]
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        args.output = ROOT / "benchmarks" / "results" / f"gpu-{slug}"
    run_stages(stages, args, facts)
    records = read_records(args.output)
    plot(
        attention_results([records[name] for name in SOURCES if name in records]),
        args.plot,
        facts["gpu"],
    )
    summary = build_summary(records, [s.name for s in all_stages(args)])
    (args.output / "summary.md").write_text(summary)
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
