# SPDX-License-Identifier: Apache-2.0
"""Every measurement for a machine with one GPU, in order; call again to resume.

    python -m benchmarks.gpu.run_all --minutes 9

The first call installs this package, if it is not. A stage is a process with a time
limit of its own and answers a question; the questions come in the order of their
worth. OUTPUT holds results.json, in which all that a stage wrote is kept whole, log.txt
and summary.md. A stage that is there is not run again, unless it failed; one that ran
out of time goes on where it was. The summary says of each target whether it was met,
and last what is unanswered.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.host import ROOT, about, end, environment, install, recorded
from benchmarks.gpu.plot import attention_results, plot
from benchmarks.gpu.stages import OUT, Stage, all_stages, toy
from benchmarks.gpu.summary import INTERPRETER, SOURCES, build_summary

RESULTS, LOG, SUMMARY = "results.json", "log.txt", "summary.md"
MINUTES = 9
Records = dict[str, dict[str, Any]]


def done(record: dict[str, Any], stage: Stage) -> bool:
    whole = record and "failed" not in record
    return bool(whole) and (stage.needs is None or stage.needs.exists())


def resumable(record: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether a stage only ran out of time, with this code."""
    same = record.get("about", {}).get("commit") == facts.get("commit")
    return bool(record.get("stopped") and record.get("result") and same)


def run_stage(
    stage: Stage, output: Path, seconds: float, facts: dict[str, Any], before: Any
) -> dict[str, Any]:
    """Run to the end or the limit; return the record.

    Args:
        stage: to run.
        output: folder of the log.
        seconds: at most.
        facts: of `about`.
        before: what it wrote when it was stopped, or None to begin anew.
    """
    given = environment(facts, stage.environment)
    variables = os.environ | {name: value for name, (value, _) in given.items()}
    record: dict[str, Any] = {
        "stage": stage.name,
        "about": facts,
        "environment": recorded(given),
    }
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        (output / LOG).open("ab") as stream,
    ):
        out = Path(folder) / "out.json"
        if before is not None:
            out.write_text(json.dumps(before))
        command = [str(out) if part == OUT else part for part in stage.command]
        record["command"] = shlex.join(stage.command)
        stream.write(f"\n=== {stage.name}: {record['command']}\n".encode())
        stream.flush()
        begin = stream.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if status := process.wait(seconds):
                record["failed"] = f"exit status {status}"
        except subprocess.TimeoutExpired:
            end(process)
            record |= {"failed": f"stopped after {seconds:.0f} s", "stopped": True}
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
        with (output / LOG).open("rb") as text:
            text.seek(begin)
            lines = text.read().decode(errors="replace").splitlines()
        record["log"] = lines[-30:]
    return record


def read_records(output: Path) -> Records:
    """By stage."""
    path = output / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def write_records(output: Path, records: Records) -> None:
    """All or nothing: a call may be killed at any time."""
    part = output / f"{RESULTS}.part"
    part.write_text(json.dumps(records) + "\n")
    part.replace(output / RESULTS)


def run_stages(
    stages: list[Stage], args: argparse.Namespace, facts: dict[str, Any]
) -> None:
    """Run what is not there yet, and last what failed before.

    Raises:
        SystemExit: the output is another machine's.
    """
    deadline = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    records = read_records(args.output)
    others = {r["about"].get("gpu") for r in records.values()} - {facts.get("gpu")}
    if others:
        raise SystemExit(
            f"--output {args.output}: it holds results of {others.pop()}, and this is "
            f"{facts.get('gpu')}; give another folder"
        )

    def broken(stage: Stage) -> bool:
        record = records.get(stage.name, {})
        needed = stage.needs is not None  # by the others
        return "failed" in record and not record.get("stopped") and not needed

    for stage in sorted(stages, key=broken):
        before = records.get(stage.name, {})
        if not args.force and done(before, stage):
            print(f"{stage.name}: there already", flush=True)
            continue
        if stage.uses and not stage.uses.exists():
            missing = f"no {stage.uses}; run the stage model first"
            print(f"{stage.name}: {missing}", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < min(stage.least, stage.limit):
            print(f"{stage.name}: no time is left; call again to go on", flush=True)
            continue
        seconds = min(stage.limit, left)
        print(f"{stage.name}: at most {seconds:.0f} s. {stage.question}", flush=True)
        goes_on = not args.force and resumable(before, facts)
        kept = before["result"] if goes_on else None
        record = run_stage(stage, args.output, seconds, facts, kept)
        if goes_on:
            record["seconds"] += before["seconds"]
        records[stage.name] = record
        write_records(args.output, records)
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
    help_text = "toy sizes on Triton's interpreter, to try every stage without a GPU"
    add("--on-cpu", action="store_true", help=help_text)
    help_text = f"for all stages of this call; default: {MINUTES}, and 60 with --on-cpu"
    add("--minutes", type=float, help=help_text)
    add("--model", type=Path, help="of the engine stages, instead of a widened one")
    help_text = "the model to widen, of which starts and float32 tokens are taken"
    add("--source", type=Path, default=ROOT / "demo" / "model", help=help_text)
    add("--model-dir", type=Path, help="where to write that, 14 GB, if it is missing")
    add("--dataset", default=str(ROOT / "benchmarks" / "python_prompts.jsonl"))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--max-tokens", type=int, default=128)
    add("--commit", help="of the code, where git does not know")
    add("--plot", type=Path, help="default: OUTPUT/kernel-times.svg")
    args = parser.parse_args(arguments)
    if args.minutes is None:
        args.minutes = 60 if args.on_cpu else MINUTES
    for name in ("output", "model", "source", "model_dir", "data_dir", "plot"):
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


def onto_cpu(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Set up a run on a CPU: a toy model, the interpreter for every child process."""
    from tests.harness.environment import v2_environment
    from tests.harness.models import make_model

    os.environ.update(v2_environment(VLLM_LOGGING_LEVEL="INFO"))
    facts["gpu"] = INTERPRETER
    args.output = args.output or Path(tempfile.mkdtemp(prefix="lookahead-on-cpu-"))
    args.models = tempfile.TemporaryDirectory()  # until this process ends
    folder = Path(args.models.name)
    args.source = make_model(folder / "toy", 0, 2)
    args.model_dir = folder / "wide"


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.dry_run:
        for stage in chosen(args):
            print(f"{stage.name} (at most {stage.limit} s)")
            print(f"  {shlex.join(stage.command)}")
        return
    install()
    facts = about()
    facts["commit"] = args.commit or facts["commit"]
    if args.on_cpu:
        onto_cpu(args, facts)
    if not facts.get("gpu"):
        raise SystemExit(
            "no GPU; --dry-run prints the stages and their commands, --on-cpu tries "
            "them on toy sizes"
        )
    if args.output is None:
        name = args.name or facts["gpu"]
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        args.output = ROOT / "benchmarks" / "results" / f"gpu-{slug}"
    stages = chosen(args)
    if args.on_cpu:
        stages = [toy(stage) for stage in stages]
    run_stages(stages, args, facts)
    records = read_records(args.output)
    plot(
        attention_results([records[name] for name in SOURCES if name in records]),
        args.plot or args.output / "kernel-times.svg",
        facts["gpu"],
    )
    questions = {s.name: s.question for s in all_stages(args)}
    summary = build_summary(records, questions)
    (args.output / SUMMARY).write_text(summary)
    print(f"{args.output} holds {RESULTS}, {SUMMARY} and {LOG}\n\n{summary}", end="")


if __name__ == "__main__":
    main()
