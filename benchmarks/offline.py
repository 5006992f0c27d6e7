# SPDX-License-Identifier: Apache-2.0
"""Throughput of lookahead beside plain vLLM and its own draft-free methods.

    python benchmarks/offline.py --model demo/model --dataset prompts.jsonl \\
        --methods plain,ngram,suffix,lookahead,lookahead:15/5/15

Every method runs in an engine of its own, all with the same options, in turn:
plain, ngram, ..., plain, ngram, ... The ratio to plain is taken within a turn, so
that it holds when the machine's speed drifts, and the median of the turns is
printed. Engines that wait are stopped.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prompts as prompt_sets  # type: ignore[import-not-found]
import torch
from commit import commit  # type: ignore[import-not-found]
from engine_process import EngineProcess  # type: ignore[import-not-found]

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 5}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "ngram": {**NGRAM, "prompt_lookup_min": 2},
    "ngram_gpu": {**NGRAM, "method": "ngram_gpu", "prompt_lookup_min": 2},
    "ngram-default": {"method": "ngram", "num_speculative_tokens": 5},
    # Turns repeat their prompts: a cache of past responses would replay them.
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
    "suffix-cached": {"method": "suffix"},
    "lookahead": {"method": "lookahead"},
    "lookahead-off": {"method": "lookahead"},  # by each request
}
# {method: [result of each turn]}
Turns = dict[str, list[dict[str, Any]]]
MIN_REPEATS = 3
OUTPUT = Path("offline.json")
SIZES = ("window_size", "ngram_size", "verification_set_size", "node_budget")


def speculative_config(method: str) -> dict[str, Any] | None:
    """What a name of `--methods` stands for; "lookahead:W/N/G" gives sizes.

    A fourth one is the budget of nodes.
    """
    name, _, sizes = method.partition(":")
    if name not in METHODS or (sizes and name != "lookahead"):
        known = ", ".join([*METHODS, "lookahead:W/N/G"])
        raise SystemExit(f"--methods {method}: unknown; use {known}")
    config = METHODS[name]
    if not sizes:
        return config
    numbers = sizes.split("/")
    if len(numbers) not in (3, 4) or not all(n.isdecimal() for n in numbers):
        raise SystemExit(
            f"--methods {method}: sizes are three or four whole numbers, as in "
            "lookahead:15/5/15"
        )
    values = dict(zip(SIZES, map(int, numbers), strict=False))
    return {"method": "lookahead", **values}


def distinct_trigrams(tokens: list[int]) -> float:
    """Distinct trigrams over all trigrams: low where a text loops."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / max(1, len(trigrams))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="demo/model")
    help_text = "one or more, with commas; each is measured at each temperature"
    prompts = str(Path(__file__).parent / "python_prompts.jsonl")
    add("--dataset", default=prompts, help=help_text)
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--methods", default="plain,ngram,suffix,lookahead")
    add("--chat", action="store_true", help="through the model's chat template")
    add("--json-schema", metavar="FILE", help="of every output")
    add("--num-prompts", type=int, default=16)
    add("--max-tokens", type=int, default=200)
    add("--temperature", default="0.8", help="one or more, with commas")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=1)
    add("--repeats", type=int, default=MIN_REPEATS, help="turns; three or more")
    help_text = "leave out prompts whose plain output has fewer distinct trigrams"
    add("--min-distinct", type=float, default=0.0, metavar="RATIO", help=help_text)
    add("--keep", type=int, help="most prompts to keep of those that do not loop")
    add("--eager", action="store_true", help="no torch.compile")
    add("--dtype", default="auto")
    add("--max-model-len", type=int, default=2048)
    add("--kv-cache-memory-bytes", type=int, default=256 << 20)
    help_text = "of each engine, free when it starts; all are on the GPU at once"
    add("--gpu-memory-utilization", type=float, metavar="SHARE", help=help_text)
    add("--start-limit", type=float, metavar="SECONDS", help="per engine")
    help_text = f"raw JSON, {OUTPUT}; of several cells NAME-DATASET-TEMPERATURE.json"
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help=help_text)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1, and 3 for a median")
    if args.repeats < MIN_REPEATS:
        print(
            f"--repeats {args.repeats}: to try things out; a result is the median of "
            f"at least {MIN_REPEATS} turns",
            file=sys.stderr,
        )
    return args


@dataclass(frozen=True)
class Cell:
    """What every method is measured on at once."""

    dataset: str
    temperature: float

    @property
    def name(self) -> str:
        return f"{Path(self.dataset).stem}-{self.temperature:g}"


def cells(args: argparse.Namespace) -> list[Cell]:
    try:
        temperatures = [float(t) for t in args.temperature.split(",")]
    except ValueError:
        raise SystemExit(
            f"--temperature {args.temperature}: give numbers, as in 0.8,0"
        ) from None
    return [Cell(d, t) for d in args.dataset.split(",") for t in temperatures]


def start(
    args: argparse.Namespace, folder: Path
) -> tuple[dict[str, EngineProcess], dict[str, str]]:
    """The engine of each method, and why a method has none."""
    engines: dict[str, EngineProcess] = {}
    not_run: dict[str, str] = {}
    configs = {m: speculative_config(m) for m in args.methods.split(",")}
    for method, config in configs.items():
        is_suffix = config is not None and config["method"] == "suffix"
        if is_suffix and not importlib.util.find_spec("arctic_inference"):
            not_run[method] = "its package arctic-inference is not installed"
            print(f"{method}: skipped, {not_run[method]}")
            continue
        options: dict[str, Any] = {
            "model": args.model,
            "dtype": args.dtype,
            "enforce_eager": args.eager,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.batch_size,
            "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
            # A prompt must cost the same in every turn.
            "enable_prefix_caching": False,
        }
        if args.gpu_memory_utilization:
            options["gpu_memory_utilization"] = args.gpu_memory_utilization
        if config is not None:
            options["speculative_config"] = config
            if config["method"] != "lookahead" and not torch.cuda.is_available():
                options["worker_extension_cls"] = "mended_baselines.WorkerExtension"
        print(f"starting {method}", flush=True)
        log = folder / f"{method.replace('/', '-').replace(':', '-')}.log"
        try:
            engines[method] = EngineProcess(options, log, args.start_limit)
        except RuntimeError as error:
            not_run[method] = str(error)
            print(f"{method}: skipped, {error}", flush=True)
    return engines, not_run


def measure(
    args: argparse.Namespace,
    cell: Cell,
    engines: dict[str, EngineProcess],
    not_run: dict[str, str],
    save: Callable[[Turns, int], None],
) -> Turns:
    """All turns; `save` takes those so far and the number of prompts after each.

    An engine that dies moves from `engines` to `not_run`; the others go on.
    """
    texts: list[Any]
    texts = prompt_sets.load(cell.dataset, args.data_dir, args.num_prompts)
    if args.chat:
        chats = prompt_sets.as_chats(texts, args.model)
        texts = [{"prompt_token_ids": tokens} for tokens in chats]

    def job(texts: list[Any], extra: dict[str, Any] | None = None) -> dict[str, Any]:
        params = {
            "max_tokens": args.max_tokens,
            "temperature": cell.temperature,
            "ignore_eos": not args.json_schema,
        }
        if args.json_schema:
            schema = json.loads(Path(args.json_schema).read_text())
            params["structured_outputs"] = {"json": schema}
        seeds = [{"seed": args.seed + i} for i in range(len(texts))]
        own = seeds if cell.temperature else [{}] * len(texts)
        return {"prompts": texts, "params": [params | p | (extra or {}) for p in own]}

    def run(method: str, *given: Any) -> dict[str, Any] | None:
        try:
            return engines[method].run(job(*given))
        except RuntimeError as error:
            not_run[method] = str(error)
            print(f"{method}: died, {error}", flush=True)
            engines.pop(method).close()
            return None

    if args.min_distinct:
        plain = next(iter(engines.values())).run(job(texts))["steps"]
        texts = [
            text
            for text, steps in zip(texts, plain, strict=True)
            if distinct_trigrams(sum(steps, [])) >= args.min_distinct
        ][: args.keep]
        print(f"{len(texts)} prompts whose output does not loop")
        if not texts:
            return {}
    for method in list(engines):
        run(method, texts[: max(2, args.batch_size)])
    turns: Turns = {}
    for turn in range(args.repeats):
        for method in list(engines):
            off = {"extra_args": {"lookahead": 0}} if method == "lookahead-off" else {}
            result = run(method, texts, off)
            if result is None:
                turns.pop(method, None)
                continue
            tokens = sum(len(t) for steps in result["steps"] for t in steps)
            steps = sum(map(len, result["steps"]))
            outputs: list[list[int]] = [sum(steps, []) for steps in result.pop("steps")]
            del result["times"]
            result |= {"tokens": tokens, "request_steps": steps, "outputs": outputs}
            turns.setdefault(method, []).append(result)
            print(f"turn {turn + 1}, {method}: {tokens / result['seconds']:.1f} tok/s",
                  flush=True)  # fmt: skip
        if not turns:
            break
        save(turns, len(texts))
    return turns


def summarize(turns: Turns) -> dict[str, dict[str, Any]]:
    """By method, what the table shows."""
    rows: dict[str, dict[str, Any]] = {}
    plain = turns.get("plain")
    for method, results in turns.items():
        speeds = [r["tokens"] / r["seconds"] for r in results]
        row = {
            "tokens_per_second": statistics.median(speeds),
            "steps": results[0]["request_steps"],
            "acceptance_length": results[0]["tokens"] / results[0]["request_steps"],
            "distinct_trigrams": statistics.mean(
                map(distinct_trigrams, results[0]["outputs"])
            ),
            "peak_memory_mib": max(r["peak_memory_mib"] for r in results),
        }
        if plain:
            base = [r["tokens"] / r["seconds"] for r in plain]
            ratios = [s / b for s, b in zip(speeds, base, strict=True)]
            row["ratio"] = statistics.median(ratios)
            row["ratios"] = ratios
            row["outputs_equal"] = sum(
                a == b
                for a, b in zip(results[0]["outputs"], plain[0]["outputs"], strict=True)
            )
        rows[method] = row
    return rows


def report(turns: Turns) -> None:
    if not turns:
        return
    header = f"{'method':20} {'tok/s':>8} {'steps':>7} {'accept':>7} {'MiB':>7}"
    print(f"\n{header} {'vs plain':>8}  equal outputs")
    for method, row in summarize(turns).items():
        print(
            f"{method:20} {row['tokens_per_second']:8.1f} {row['steps']:7d} "
            f"{row['acceptance_length']:7.2f} {row['peak_memory_mib']:7.0f} "
            + (
                f"{row['ratio']:7.2f}x  {row['outputs_equal']}"
                f"/{len(turns[method][0]['outputs'])}"
                if "ratio" in row
                else ""
            )
        )


def environment() -> dict[str, str | None]:
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "commit": commit(),
        "command": " ".join(["python", script, *map(_without_folder, sys.argv[1:])]),
        "python": platform.python_version(),
        "processor": _processor(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def main() -> None:
    args = parse()
    measured = cells(args)
    with tempfile.TemporaryDirectory() as folder:
        engines, not_run = start(args, Path(folder))
        if not engines:
            raise SystemExit("no engine started")

        try:
            for cell in measured:
                print(f"\n{cell.name}", flush=True)
                output = args.output
                if len(measured) > 1:
                    output = output.with_name(f"{output.stem}-{cell.name}.json")
                save = Save(args, cell, engines, not_run, output)
                turns = measure(args, cell, engines, not_run, save)
                if not engines:
                    raise SystemExit("no engine is left")
                report(turns)
                if turns:
                    print(f"raw JSON: {output}")
        finally:
            for engine in engines.values():
                engine.close()


@dataclass
class Save:
    """Writes a cell's turns as they come."""

    args: argparse.Namespace
    cell: Cell
    engines: dict[str, EngineProcess]
    not_run: dict[str, str]
    output: Path

    def __call__(self, turns: Turns, num_prompts: int) -> None:
        given = vars(self.args) | asdict(self.cell)
        settings = {k: _without_folder(v) for k, v in given.items() if k != "output"}
        about = {**environment(), **next(iter(self.engines.values())).about}
        raw = {
            "about": about,
            "settings": settings,
            "num_prompts": num_prompts,
            "not_run": self.not_run,
            "summary": summarize(turns),
            "turns": {method: _lean(turns[method]) for method in turns},
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(raw) + "\n")


def _without_folder(value: Any) -> Any:
    """A result says which model or file it is of, not where that lay."""
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def _lean(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the first turn's outputs, which are enough."""
    rest = [{k: v for k, v in r.items() if k != "outputs"} for r in results[1:]]
    return [*results[:1], *rest]


if __name__ == "__main__":
    main()
