# SPDX-License-Identifier: Apache-2.0
"""Correctness, then time, of the kernels on this machine's GPU.

    python -m benchmarks.gpu.kernels --out kernels.json --plot kernels.png

Attention is timed on as many layers' K/V as exceed the L2 cache, and compared with
FlashAttention's time for as many causal queries on the same context. Without a GPU,
`TRITON_INTERPRET=1` and `--smoke` run small shapes: their times mean nothing.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.attention import (
    APPROXIMATE,
    CONTENDERS,
    Problem,
    Shape,
    Unavailable,
    flash_version,
    max_error,
)
from benchmarks.gpu.plot import plot
from benchmarks.gpu.step_kernels import step_calls
from benchmarks.gpu.timing import microseconds
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels import attention
from vllm_lookahead.triton_kernels.attention_config import Config

NODES = [16, 32, 64, 120]  # of a tree
CONTEXTS = [1024, 2048, 4096, 8192, 32768]
HEADS = ["32/32", "32/8"]
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}
COLD_BYTES = 2e8  # a few times the L2 cache of an H200
YARDSTICK = "flash_causal"
STEP_SIZES = [(15, 5, 15), (5, 4, 5), (0, 5, 15)]  # W, N, G
SLOW = {"flex"}  # to compile, at every shape: the widest tree will do
OURS = ("tree", "merged")
LAYERS = 32
TILES = [  # for `--sweep`; what fits, and does not spill, on sm_90
    Config(128, 64, 8, 3),
    Config(128, 64, 8, 4),
    Config(128, 128, 8, 3),
    Config(64, 64, 4, 3),
    Config(64, 64, 4, 4),
    Config(64, 32, 4, 4),
]
Result = dict[str, Any]


def time_attention(shape: Shape, name: str, device: str) -> Result:
    """One contender at one shape: an error first, and a time if that is small."""
    result: Result = {**vars(shape), "contender": name}
    layers = 2 if device == "cuda" else 1
    if device == "cuda":
        layers = min(32, max(2, math.ceil(COLD_BYTES / shape.kv_bytes)))
    torch.manual_seed(0)
    if name in SLOW:  # or its compiler gives up after so many shapes
        torch.compiler.reset()
    first = Problem(shape, device)
    try:
        call = CONTENDERS[name](first)
        if name not in APPROXIMATE:
            result["max_error"] = max_error(first, call())
            if not result["max_error"] < TOLERANCE[shape.dtype]:
                return {**result, "failed": f"error {result['max_error']:.1e}"}
        calls = [call]
        for _ in range(layers - 1):
            layer = Problem(shape, device)
            layer.scratch = first.scratch  # one for all layers, as in the engine
            calls.append(CONTENDERS[name](layer))
        return {**result, "us": microseconds(calls)}
    except Unavailable as reason:
        return {**result, "skipped": str(reason)}
    except Exception as error:  # the others are still worth measuring
        return {**result, "failed": f"{type(error).__name__}: {error}"[:500]}


def run_attention(
    args: argparse.Namespace,
    shapes: list[Shape],
    results: list[Result],
    save: Callable[[], None],
) -> None:
    known = {(r["contender"], *map(r.get, vars(shapes[0]))) for r in results}
    for shape in shapes:
        for name in args.contenders:
            if name in SLOW and shape.size != max(args.trees):
                continue
            if (name, *vars(shape).values()) in known:
                continue
            result = time_attention(shape, name, args.device)
            results.append(result)
            where = f"T={shape.size} context={shape.context}"
            where += f" heads={shape.num_heads}/{shape.num_kv_heads}"
            print(f"{where:40} {name:16} {describe(result)}", flush=True)
            add_ratios(results)
            save()
    for r in results:
        if r["contender"] in OURS and "ratio" in r:
            shape_text = f"T={r['size']} context={r['context']}"
            heads = f"{r['num_heads']}/{r['num_kv_heads']}"
            print(f"{r['contender']:8} {shape_text} heads={heads}: ", end="")
            print(f"{r['ratio']:.2f} of {YARDSTICK}")


def describe(result: Result) -> str:
    for outcome in ("skipped", "failed"):
        if outcome in result:
            return f"{outcome}: {result[outcome]}"
    error = f", error {result['max_error']:.1e}" if "max_error" in result else ""
    return f"{result['us']:9.1f} us{error}"


def add_ratios(results: list[Result]) -> None:
    """Each time over the yardstick's at the same shape."""

    def shape(r: Result) -> tuple:
        return r["size"], r["context"], r["num_heads"], r["num_kv_heads"]

    base = {
        shape(r): r["us"] for r in results if r["contender"] == YARDSTICK if "us" in r
    }
    for r in results:
        if "us" in r and shape(r) in base:
            r["ratio"] = r["us"] / base[shape(r)]


def sweep(args: argparse.Namespace, shapes: list[Shape]) -> list[Result]:
    """Tree attention with other tiles than it would choose."""
    results, chosen = [], attention._config
    for shape in shapes:
        for config in TILES:
            attention._config = lambda *_, config=config: config
            result = time_attention(shape, "tree", args.device)
            results.append({**result, "config": config._asdict()})
            print(shape.size, shape.context, config, describe(result), flush=True)
    attention._config = chosen
    return results


def run_step(
    args: argparse.Namespace, results: list[Result], save: Callable[[], None]
) -> None:
    """The other kernels: time of one launch among others, at several contexts."""
    blocks = (args.contexts[0] + 1024) // args.block_size
    shape = (blocks, args.block_size, 32 if args.device == "cuda" else 2, 256)
    caches = [
        torch.zeros(shape, dtype=torch.bfloat16, device=args.device)
        for _ in range(LAYERS if args.device == "cuda" else 2)
    ]
    known = [(tuple(r["sizes"]), r["context"]) for r in results]
    for sizes in args.sizes:
        for context in args.contexts:
            if (sizes, context) in known:
                continue
            params = LookaheadParams(*sizes)
            calls, parts, moved = step_calls(
                params,
                1,
                context,
                max(args.contexts),
                args.block_size,
                caches,
                args.device,
            )
            repeats = 20 if args.device == "cuda" else 1
            times, part_times = (
                {name: microseconds([c] * repeats) for name, c in these.items()}
                for these in (calls, parts)
            )
            total = sum(times.values())
            result = {"sizes": sizes, "context": context, "us": times}
            results.append({**result, "parts": part_times, "moved": moved})
            listed = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
            print(f"W,N,G={sizes} context={context}: {listed}  total {total:.1f} us")
            save()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    help_text = "keep what --out already holds"
    parser.add_argument("--resume", action="store_true", help=help_text)
    parser.add_argument("--plot", type=Path, help="draw time against context")
    parser.add_argument("--trees", nargs="+", type=int, default=NODES, metavar="T")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--heads", nargs="+", default=HEADS, metavar="Hq/Hkv")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--only", choices=["attention", "step", "sweep"])
    parser.add_argument("--smoke", action="store_true", help="tiny, and without a GPU")
    args = parser.parse_args(arguments)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.sizes = STEP_SIZES
    if args.device == "cpu" and not triton.knobs.runtime.interpret:
        parser.error("no GPU; TRITON_INTERPRET=1 and --smoke run small shapes")
    if args.smoke:
        args.trees, args.contexts, args.heads = [5], [40], ["2/1"]
        args.head_size, args.sizes = 64, [(2, 3, 2)]
    elif args.device == "cpu":
        parser.error("no GPU; --smoke runs small shapes")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    shapes = [
        Shape(
            size=size,
            context=context,
            num_heads=int(heads.split("/")[0]),
            num_kv_heads=int(heads.split("/")[1]),
            head_size=args.head_size,
            block_size=args.block_size,
            requests=args.requests,
            dtype=args.dtype,
        )
        for heads in args.heads
        for size in args.trees
        for context in args.contexts
    ]
    on_gpu = args.device == "cuda"
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flash_attention": flash_version(),
    }
    if args.resume and args.out and args.out.exists():
        results |= json.loads(args.out.read_text())

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")

    if args.only in (None, "step"):
        run_step(args, results.setdefault("step", []), save)
    if args.only in (None, "attention"):
        run_attention(args, shapes, results.setdefault("attention", []), save)
    if args.only == "sweep":
        results["sweep"] = sweep(args, shapes)
        save()
    if args.plot and "attention" in results:
        plot(results["attention"], args.plot)
    for r in results.get("attention", []):
        if r["contender"] in OURS and "failed" in r:
            raise SystemExit(f"{r['contender']} failed: see the results")


if __name__ == "__main__":
    main()
