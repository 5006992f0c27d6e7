# SPDX-License-Identifier: Apache-2.0
"""How many prompts get other tokens with lookahead than from plain vLLM.

    python -m benchmarks.gpu.engine_correctness --model MODEL --output raw.json

In bf16 some do, where the two likeliest tokens tie, as plain vLLM's own tokens differ
between batch sizes. So plain's batch 1 against batch 8 is counted beside it: what the
hardware does by itself. In float32 both counts should be zero or nearly so. Greedy
first, then sampled, a seed for each prompt.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine_process import EngineProcess
from benchmarks.gpu.names import SIZES
from benchmarks.prompts import load

PROMPTS = Path(__file__).resolve().parent.parent / "python_prompts.jsonl"
SHARES = (1.0, 0.75, 0.5, 0.25)  # of each prompt, to make four of it
TEMPERATURES = {"": 0.0, "seeded ": 0.8}  # by what the runs' names begin with
PAIRS = [
    ("plain@1", "plain@{n}"),
    ("plain@1", "lookahead@1"),
    ("plain@{n}", "lookahead@{n}"),
]


def beginnings(texts: list[str]) -> list[str]:
    """Each text, whole and cut short."""
    cut = (text[: max(1, int(len(text) * share))] for share in SHARES for text in texts)
    return list(dict.fromkeys(cut))


def compare(left: list[list[int]], right: list[list[int]]) -> dict[str, Any]:
    """Prompts whose tokens differ, and where each first does."""
    first = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if len(a) == len(b)
        else min(len(a), len(b))
        for a, b in zip(left, right, strict=True)
    ]
    where = {prompt: at for prompt, at in enumerate(first) if at is not None}
    return {"differ": len(where), "prompts": len(left), "first_difference": where}


def generate(
    engine: EngineProcess,
    texts: list[str],
    args: Any,
    temperature: float = 0,
    first_seed: int = 0,
) -> dict[str, Any]:
    """Tokens of all texts, at once: tokens and steps of each, seconds."""
    same = {"max_tokens": args.max_tokens, "ignore_eos": True}
    params: list[dict[str, Any]] = [
        same | {"temperature": temperature, "seed": seed if temperature else None}
        for seed in range(first_seed, first_seed + len(texts))
    ]
    result = engine.run({"prompts": texts, "params": params})
    steps: list[list[list[int]]] = result["steps"]
    return {
        "outputs": [sum(s, []) for s in steps],
        "steps": [len(s) for s in steps],
        "seconds": result["seconds"],
    }


def one_by_one(
    engine: EngineProcess, texts: list[str], args: Any, temperature: float = 0
) -> dict[str, Any]:
    parts = [
        generate(engine, [text], args, temperature, seed)
        for seed, text in enumerate(texts)
    ]
    return {
        "outputs": [p["outputs"][0] for p in parts],
        "steps": [p["steps"][0] for p in parts],
        "seconds": sum(p["seconds"] for p in parts),
    }


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Those of the engine, and where its prompts come from."""
    add = parser.add_argument
    add("--model", required=True)
    add("--dataset", default=str(PROMPTS))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--dtype", default="bfloat16")
    add("--max-model-len", type=int, default=1024)
    add("--kv-cache-memory-bytes", type=int, default=6 << 30)
    add("--gpu-memory-utilization", type=float, default=0.5)
    add("--eager", action="store_true", help="no torch.compile")
    help_text = "that an engine may take to start"
    add("--start-limit", type=float, default=150, metavar="SECONDS", help=help_text)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `LLM`, from `add_engine_options` and `--batch-size`."""
    return {
        "model": args.model,
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.batch_size,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        # A hit would leave the rest of a prompt to another shape of kernel.
        "enable_prefix_caching": False,
    }


def lookahead_config(sizes: str) -> dict[str, Any]:
    """Of "W/N/G".

    Raises:
        SystemExit: it is not three whole numbers.
    """
    try:
        w, n, g = map(int, sizes.split("/"))
    except ValueError:
        raise SystemExit(
            f"{sizes}: sizes are three whole numbers W/N/G, as in {SIZES}"
        ) from None
    names = {"window_size": w, "ngram_size": n, "verification_set_size": g}
    return {"method": "lookahead", **names}


def engines(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of a plain engine, and of one with lookahead at `--sizes`."""
    plain = engine_options(args)
    config = lookahead_config(args.sizes)
    return {"plain": plain, "lookahead": plain | {"speculative_config": config}}


def run_names(name: str, batch_size: int) -> list[tuple[str, float, int]]:
    """An engine's runs: name, temperature, prompts at once."""
    return [
        (f"{prefix}{name}@{size}", temperature, size)
        for prefix, temperature in TEMPERATURES.items()
        for size in (1, batch_size)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_engine_options(parser)
    add = parser.add_argument
    add("--num-prompts", type=int, default=16, help="each also cut short three times")
    add("--max-tokens", type=int, default=96)
    add("--batch-size", type=int, default=8)
    add("--sizes", default=SIZES, metavar="W/N/G")
    add("--output", type=Path, required=True)
    add("--resume", action="store_true", help="keep the runs that the output has")
    args = parser.parse_args(arguments)
    texts = beginnings(load(args.dataset, args.data_dir, args.num_prompts))
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "command": " ".join(sys.argv),
        "runs": {},
        "pairs": {},
    }
    if args.resume and args.output.exists():
        result["runs"] = json.loads(args.output.read_text())["runs"]
    for name, options in engines(args).items():
        runs = [
            r for r in run_names(name, args.batch_size) if r[0] not in result["runs"]
        ]
        if not runs:
            continue
        print(f"starting {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            engine = EngineProcess(options, Path(folder) / "log", args.start_limit)
            try:
                for run, temperature, size in runs:
                    take = one_by_one if size == 1 else generate
                    result["runs"][run] = take(engine, texts, args, temperature)
                    add_pairs(result, args.batch_size)
                    args.output.write_text(json.dumps(result) + "\n")
                    print(f"{run}: {result['runs'][run]['seconds']:.1f} s", flush=True)
            finally:
                engine.close()
    for pair, counts in result["pairs"].items():
        print(f"{pair}: {counts['differ']} of {counts['prompts']} prompts differ")


def add_pairs(result: dict[str, Any], batch_size: int) -> None:
    for prefix in TEMPERATURES:
        for pair in PAIRS:
            names = [name.format(n=batch_size) for name in pair]
            left, right = runs = [prefix + name for name in names]
            if set(runs) <= set(result["runs"]):
                outputs = [result["runs"][run]["outputs"] for run in runs]
                result["pairs"][f"{left} against {right}"] = compare(*outputs)


if __name__ == "__main__":
    main()
