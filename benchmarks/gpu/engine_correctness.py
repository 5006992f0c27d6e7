# SPDX-License-Identifier: Apache-2.0
"""How many prompts get other greedy tokens with lookahead than from plain vLLM.

    python -m benchmarks.gpu.engine_correctness --model MODEL --output raw.json

In bf16 some do, where the two likeliest tokens tie, as plain vLLM's own tokens differ
between batch sizes. So plain's batch 1 against batch 8 is counted beside it: what the
hardware does by itself. In float32 both counts should be zero or nearly so.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine_process import EngineProcess
from benchmarks.prompts import load

PROMPTS = Path(__file__).resolve().parent.parent / "python_prompts.jsonl"
SHARES = (1.0, 0.75, 0.5, 0.25)  # of each prompt, to make four of it
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


def generate(engine: EngineProcess, texts: list[str], args: Any) -> dict[str, Any]:
    """Greedy tokens of all texts, at once: tokens and steps of each, seconds."""
    params = {"max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": True}
    result = engine.run({"prompts": texts, "params": [params] * len(texts)})
    steps: list[list[list[int]]] = result["steps"]
    return {
        "outputs": [sum(s, []) for s in steps],
        "steps": [len(s) for s in steps],
        "seconds": result["seconds"],
    }


def one_by_one(engine: EngineProcess, texts: list[str], args: Any) -> dict[str, Any]:
    parts = [generate(engine, [text], args) for text in texts]
    return {
        "outputs": [p["outputs"][0] for p in parts],
        "steps": [p["steps"][0] for p in parts],
        "seconds": sum(p["seconds"] for p in parts),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", required=True)
    add("--dataset", default=str(PROMPTS))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--num-prompts", type=int, default=16, help="each also cut short three times")
    add("--max-tokens", type=int, default=96)
    add("--batch-size", type=int, default=8)
    add("--sizes", default="15/5/15", metavar="W/N/G")
    add("--dtype", default="bfloat16")
    add("--max-model-len", type=int, default=1024)
    add("--kv-cache-memory-bytes", type=int, default=6 << 30)
    add("--gpu-memory-utilization", type=float, default=0.5)
    add("--eager", action="store_true", help="no torch.compile")
    add("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    texts = beginnings(load(args.dataset, args.data_dir, args.num_prompts))
    w, n, g = map(int, args.sizes.split("/"))
    sizes = {"window_size": w, "ngram_size": n, "verification_set_size": g}
    speculative = {"plain": None, "lookahead": {"method": "lookahead", **sizes}}
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "command": " ".join(sys.argv),
        "runs": {},
        "pairs": {},
    }
    for name, config in speculative.items():
        options: dict[str, Any] = {
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
        if config:
            options["speculative_config"] = config
        print(f"starting {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            engine = EngineProcess(options, Path(folder) / "log")
            try:
                result["runs"][f"{name}@1"] = one_by_one(engine, texts, args)
                whole = generate(engine, texts, args)
                result["runs"][f"{name}@{args.batch_size}"] = whole
            finally:
                engine.close()
        add_pairs(result, args.batch_size)
        args.output.write_text(json.dumps(result) + "\n")
    for pair, counts in result["pairs"].items():
        print(f"{pair}: {counts['differ']} of {counts['prompts']} prompts differ")


def add_pairs(result: dict[str, Any], batch_size: int) -> None:
    for pair in PAIRS:
        left, right = (name.format(n=batch_size) for name in pair)
        if {left, right} <= set(result["runs"]):
            outputs = [result["runs"][name]["outputs"] for name in (left, right)]
            result["pairs"][f"{left} against {right}"] = compare(*outputs)


if __name__ == "__main__":
    main()
