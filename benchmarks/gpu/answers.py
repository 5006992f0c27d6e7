# SPDX-License-Identifier: Apache-2.0
"""Parts of the summary, in the order of the questions; a part may have no lines."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.names import PLAIN

Record = dict[str, Any]
Records = dict[str, Record]

CORRECTNESS = ("engine-float32", "engine-correctness")
STEP_COSTS = ("step-cost", "step-cost-own")


def result(records: Records, stage: str) -> dict[str, Any]:
    """What a stage wrote, in part if it failed; empty if it wrote nothing."""
    return records.get(stage, {}).get("result") or {}


def _tests(records: Records) -> Iterator[str]:
    if found := result(records, "kernel-tests"):
        counts = ", ".join(f"{n} {k}" for k, n in sorted(found["counts"].items()))
        yield f"Kernel tests: {counts}."
        for name in found["failures"]:
            yield f"- FAILED {name}"


def _starts(records: Records) -> Iterator[str]:
    for name, found in result(records, "engine-start").get("engines", {}).items():
        if "failed" in found:
            yield f"- {name} DID NOT RUN: {found['failed'][:300]}"
            continue
        said = [
            line for fact in ("runner", "attention") for line in found.get(fact, [])
        ]
        said += found.get("graphs", ["no CUDA graph was captured"])
        seconds = f"{found['seconds_to_start']:.0f} s"
        yield f"- {name} started in {seconds}: {', '.join(said)}"


def _correctness(records: Records) -> Iterator[str]:
    for stage in CORRECTNESS:
        found = result(records, stage)
        for pair, counts in found.get("pairs", {}).items():
            settings = found["settings"]
            what = f"{settings['dtype']}, {settings['max_tokens']} tokens"
            differ = f"{counts['differ']} of {counts['prompts']} prompts differ"
            yield f"- {stage}, {what}: {pair}: {differ}"


def _steps(records: Records) -> Iterator[str]:
    rows = [r for stage in STEP_COSTS for r in result(records, stage).get("rows", [])]
    if not rows:
        return
    plain = {row["context"]: row for row in rows if row["server"] == PLAIN}
    yield "A decode step at batch 1, by the nodes fed; a CUDA graph may compute more:"
    yield ""
    yield "| context | nodes | graph | request | server | ms | over plain |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["context"], row["nodes"])):
        base = plain.get(row["context"])
        ratio = f"{row['step_ms'] / base['step_ms']:.2f}x" if base else "-"
        yield (
            f"| {row['context']} | {row['nodes']} | {row.get('graph', '-')} "
            f"| {row['tree']} | {row['server']} | {row['step_ms']:.2f} | {ratio} |"
        )


def _sizes(records: Records) -> Iterator[str]:
    rows = result(records, "engine-sizes").get("rows", [])
    if not rows:
        return
    base = next((r["tokens_per_second"] for r in rows if r["server"] == PLAIN), None)
    yield "engine-sizes: requests with sizes of their own, batch 1, greedy:"
    yield ""
    yield "| request | nodes | tok/s | over plain | step, ms | tokens a step |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        ratio = f"{row['tokens_per_second'] / base:.2f}x" if base else "-"
        yield (
            f"| {row['tree']} | {row['nodes']} | {row['tokens_per_second']:.1f} "
            f"| {ratio} | {row['step_ms']:.2f} | {row['tokens_per_step']:.2f} |"
        )


def _tiles(records: Records) -> Iterator[str]:
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for r in result(records, "kernel-tiles").get("sweep", []):
        shape = r["size"], r["context"]
        if "us" in r and (shape not in best or r["us"] < best[shape]["us"]):
            best[shape] = r
    for (size, context), r in best.items():
        tile = f"{r['config']}, {r['us']:.1f} us"
        yield f"- Best tile, T={size}, context {context}: {tile}"


ANSWERS = (_tests, _starts, _correctness, _steps, _sizes, _tiles)
