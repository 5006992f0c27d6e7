# SPDX-License-Identifier: Apache-2.0
"""What `run_all` measured, in Markdown: targets first, last what is unanswered."""

import shlex
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.answers import ANSWERS, Record, Records, result
from benchmarks.gpu.names import LOOKAHEAD, PLAIN, SIZES
from benchmarks.gpu.plot import attention_results

INTERPRETER = "Triton's interpreter"  # stands for the GPU of a run on a CPU
CANNOT_SHOW = (
    "A run of toy sizes on a CPU. No number here is a measurement, and it cannot show:",
    "- CUDA graphs: capture, replay, what a graph holds",
    "- streams, and host work beside the GPU's",
    "- memory profiling, and whether engines fit beside one another",
    "- compiled kernels: their numbers and what their tiles take",
    "- FlashAttention, FlexAttention and torch.compile",
    "- what ngram_gpu, ngram and suffix do on a GPU",
    "- times",
)
SOURCES = ("kernel-times", "kernel-flex")  # of attention's times
SPEEDS = ("engine-speed", "engine-distinct", "engine-baselines", "engine-sampled")
TARGET_CONTEXTS = (1024, 2048, 4096, 8192)  # of the targets
SHORT, LONG = 1024, 32768  # contexts between which filing them is to take as long
WIDENED = (
    "The engine stages ran a small trained Llama ({source}) widened into another "
    "shape, Llama-2-7B's unless its command says otherwise (`benchmarks/widen_model."
    "py`): extra layers, heads and channels are computed and come to nothing. Its "
    "steps cost what that shape's steps cost; its text, and so the acceptance, is the "
    "small model's. It is no 7B model in any other sense, and these tokens per second "
    "are not those of a trained one."
)
GIVEN = "The engine stages ran the model of the folder `{model}`, given with `--model`."


@dataclass(frozen=True)
class Target:
    """A bound, and what was measured, by condition; None where nothing was."""

    what: str
    bound: float
    values: dict[str, float | None]
    unit: str = ""
    at_least: bool = False

    @property
    def verdict(self) -> str:
        known = [v for v in self.values.values() if v is not None]
        misses = [v < self.bound if self.at_least else v > self.bound for v in known]
        if any(misses):
            return "NOT MET"
        return "met" if known and len(known) == len(self.values) else "not measured"

    def row(self, verdict: str = "") -> str:
        verdict = verdict or self.verdict
        sign = "at least" if self.at_least else "at most"
        values = ", ".join(
            f"{'-' if v is None else f'{v:.3g}{self.unit}'}{f' ({k})' if k else ''}"
            for k, v in self.values.items()
        )
        bound = f"{sign} {self.bound:g}{self.unit}"
        return f"| {self.what} | {bound} | {values} | {verdict} |"


def step_ms(results: list[dict[str, Any]]) -> float:
    """Median over the turns of a batch-1 run; a prefill counts as a step."""
    return statistics.median(1e3 * r["seconds"] / r["request_steps"] for r in results)


def kernel_times(records: Records) -> list[dict[str, Any]]:
    """Of the kernels but attention at SIZES, a result for each context."""
    sizes = [int(size) for size in SIZES.split("/")]
    steps = result(records, "kernel-times").get("step", [])
    return [r for r in steps if r["sizes"] == sizes]


def overheads(records: Records) -> dict[int, dict[str, float]]:
    """Microseconds of each kernel but attention, by context, at SIZES."""
    found = {r["context"]: dict(r["us"]) for r in kernel_times(records)}
    # Timed at one context only, for its cost does not depend on it.
    compact = next((us["compact"] for us in found.values() if "compact" in us), None)
    for us in found.values():
        if compact is not None:
            us.setdefault("compact", compact)
    return found


def flatness(records: Records) -> float | None:
    """The time to file a long context over that of a short one."""
    us = {r["context"]: r["parts"]["index"] for r in kernel_times(records)}
    return us[LONG] / us[SHORT] if {SHORT, LONG} <= us.keys() else None


def targets(records: Records) -> list[Target]:
    ratio: dict[str, float | None] = {f"{c}": None for c in TARGET_CONTEXTS}
    for r in attention_results([records.get("kernel-times", {})]):
        shape = r["size"], r["num_heads"], r["num_kv_heads"], r["contender"]
        if shape == (120, 32, 32, "tree") and r["context"] in TARGET_CONTEXTS:
            ratio[str(r["context"])] = r.get("ratio")
    version = result(records, "kernel-times").get("flash_attention") or "?"
    other = "" if version in (3, "?") else f" (here only version {version})"
    attention = (
        f"tree attention, T=120, 32 heads of 128, over FlashAttention 3's{other}"
    )

    turns = result(records, "engine-speed").get("turns", {})
    rows = result(records, "engine-speed").get("summary", {})
    plain_ms = step_ms(turns[PLAIN]) if PLAIN in turns else None
    step_ratio = None
    if plain_ms and LOOKAHEAD in turns:
        step_ratio = step_ms(turns[LOOKAHEAD]) / plain_ms
    mask: dict[str, float | None] = {str(c): None for c in TARGET_CONTEXTS}
    share: dict[str, float | None] = dict(mask)
    for context, us in overheads(records).items():
        if context in TARGET_CONTEXTS:
            mask[str(context)] = us["mask"]
            if plain_ms and "compact" in us:
                share[str(context)] = sum(us.values()) / plain_ms / 10
    greedy = "batch 1, greedy, bf16"
    speed_up = rows.get(LOOKAHEAD, {}).get("ratio")
    rows = result(records, "engine-distinct").get("summary", {})
    distinct = rows.get(LOOKAHEAD, {}).get("ratio")
    gain = f"tokens/s over plain's, {greedy}"
    return [
        Target(f"{attention}, by context", 1.3, ratio, "x"),
        Target("mask build, by context", 10, mask, " us"),
        Target("kernels outside attention, of a plain step", 5, share, "%"),
        Target(f"index, {LONG} over {SHORT}", 1.3, {"": flatness(records)}, "x"),
        Target(f"a step over plain's, {greedy}", 1.35, {"": step_ratio}, "x"),
        Target(gain, 1.6, {"": speed_up}, "x", True),
        Target(f"{gain}, text that does not loop", 1.6, {"": distinct}, "x", True),
    ]


def build_summary(records: Records, questions: dict[str, str]) -> str:
    """Markdown of all that was measured.

    Args:
        records: by stage, as `run_all` keeps them.
        questions: by stage, all there are, in order.
    """
    about: Record = next((r["about"] for r in records.values() if "about" in r), {})
    lines = [f"# {about.get('gpu')}", ""]
    if about.get("gpu") == INTERPRETER:
        lines += ["A run on a CPU: no number here is a measurement.", ""]
    lines.append(", ".join(f"{k} {v}" for k, v in about.items() if k != "gpu"))
    commits = {r["about"].get("commit") for r in records.values() if "about" in r}
    if len(commits) > 1:
        lines.append(f"Stages ran at different commits: {sorted(map(str, commits))}")
    lines += ["", "| target | bound | measured | |", "|---|---|---|---|"]
    verdict = "on a CPU" if about.get("gpu") == INTERPRETER else ""
    lines += [target.row(verdict) for target in targets(records)]
    lines += ["", "| stage | seconds | |", "|---|---|---|"]
    for stage in questions:
        record = records.get(stage, {"seconds": 0, "failed": "not run"})
        outcome = record.get("failed", "done")
        lines.append(f"| {stage} | {record['seconds']:.0f} | {outcome} |")
    for part in (_model, *ANSWERS, _attention, _overheads, _speed):
        if text := list(part(records)):
            lines += ["", *text]
    if about.get("gpu") == INTERPRETER:
        lines += ["", *CANNOT_SHOW]
    lines += ["", *_unanswered(records, questions)]
    return "\n".join(lines) + "\n"


def _unanswered(records: Records, questions: dict[str, str]) -> Iterator[str]:
    unknown: dict[str, list[str]] = {}
    for stage, question in questions.items():
        record = records.get(stage, {"failed": "not run"})
        reasons = [record["failed"]] if "failed" in record else []
        for method, reason in result(records, stage).get("not_run", {}).items():
            last = reason.splitlines()[-1] if reason else "?"
            reasons.append(f"{method} not run: {last[:120]}")
        found = [f"{stage}: {reason}" for reason in reasons]
        if found:
            unknown.setdefault(question, []).extend(found)
    if not unknown:
        yield "Every question was answered."
        return
    yield "Unanswered, or in part:"
    for question, found in unknown.items():
        yield f"- {question} ({'; '.join(found)})"


def _model(records: Records) -> Iterator[str]:
    settings = [result(records, stage).get("settings") for stage in SPEEDS]
    model = next((s["model"] for s in settings if s), None)
    command = shlex.split(records.get("model", {}).get("command", ""))
    made = dict(zip(command, command[1:], strict=False))
    if made and model in (None, Path(made["--output"]).name):
        yield WIDENED.format(source=made["--source"])
    elif model:
        yield GIVEN.format(model=model)


def _attention(records: Records) -> Iterator[str]:
    results = attention_results([records.get(stage, {}) for stage in SOURCES])
    results = [r for r in results if r["size"] == 120]
    contexts = sorted({r["context"] for r in results})
    for heads in dict.fromkeys((r["num_heads"], r["num_kv_heads"]) for r in results):
        here = [r for r in results if (r["num_heads"], r["num_kv_heads"]) == heads]
        yield f"Attention, T=120, {heads[0]} heads on {heads[1]}, microseconds by "
        yield "context (and over FlashAttention's causal):"
        yield ""
        yield "| | " + " | ".join(map(str, contexts)) + " |"
        yield "|---|" + "---|" * len(contexts)
        for name in dict.fromkeys(r["contender"] for r in here):
            cells = {r["context"]: _time(r) for r in here if r["contender"] == name}
            row = " | ".join(cells.get(c, "-") for c in contexts)
            yield f"| {name} | {row} |"
        yield ""


def _time(r: dict[str, Any]) -> str:
    for outcome in ("skipped", "failed"):
        if outcome in r:
            return f"{outcome}: {r[outcome]}".replace("|", "/").split("\n")[0][:80]
    return f"{r['us']:.1f}" + (f" ({r['ratio']:.2f}x)" if "ratio" in r else "")


def _overheads(records: Records) -> Iterator[str]:
    for context, us in overheads(records).items():
        listed = ", ".join(f"{name} {t:.1f}" for name, t in us.items())
        yield f"- Kernels of a step at {SIZES}, context {context}: {listed} us"
    if moved := {r["moved"] for r in kernel_times(records)}:
        nodes = " or ".join(map(str, sorted(moved)))
        yield f"- The compaction moves {nodes} nodes of a request, in 32 layers."


def _speed(records: Records) -> Iterator[str]:
    for stage in SPEEDS:
        found = result(records, stage)
        if not found:
            continue
        settings, turns = found["settings"], found["turns"]
        yield (
            f"{stage}: batch {settings['batch_size']}, temperature "
            f"{settings['temperature']}, {found['num_prompts']} prompts of "
            f"{settings['max_tokens']} tokens. Text that loops has few distinct "
            "trigrams, and drafts for it are easily right."
        )
        yield ""
        yield "| | tok/s | over plain | step, ms | tokens a step | distinct trigrams |"
        yield "|---|---|---|---|---|---|"
        for method, row in found["summary"].items():
            yield (
                f"| {method} | {row['tokens_per_second']:.1f} "
                f"| {row.get('ratio', float('nan')):.2f}x "
                f"| {step_ms(turns[method]):.2f} | {row['acceptance_length']:.2f} "
                f"| {row['distinct_trigrams']:.2f} |"
            )
        for method, reason in found.get("not_run", {}).items():
            yield f"| {method} | not run: {reason.splitlines()[-1][:120]} | | | | |"
        yield ""
