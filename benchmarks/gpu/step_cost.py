# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step, plain and with trees of several sizes, at batch 1.

    python -m benchmarks.gpu.step_cost --model MODEL --servers plain 15/5/15 \\
        --trees 2/5/0 8/5/0 15/5/15 --contexts 1024 8192 --out steps.json

An engine per server, one after another; of a lookahead server, requests with sizes of
their own (`--trees`) and requests that are switched off. A step's time is the median of
the times between two outputs of a request, so that no prefill is in it.

A CUDA graph may hold more nodes than a tree that is smaller than the server's: "graph"
says how many are computed. A server of the tree's own size computes no more than it.
"""

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from benchmarks.engine_process import EngineProcess
from benchmarks.gpu.engine_correctness import (
    add_engine_options,
    engine_options,
    lookahead_config,
)
from benchmarks.gpu.names import PLAIN, SIZES
from benchmarks.prompts import load
from vllm_lookahead.params import (
    MAX_TREE_NODES,
    REQUEST_PREFIX,
    REQUEST_SWITCH,
    LookaheadParams,
)

OFF = "off"
Row = dict[str, Any]


def sizes_of(text: str) -> dict[str, Any]:
    """Of "W/N/G", by name."""
    return {k: v for k, v in lookahead_config(text).items() if k != "method"}


def params_of(text: str) -> LookaheadParams:
    return LookaheadParams(**sizes_of(text))


def prompts(args: argparse.Namespace, context: int) -> list[Any]:
    """Prompts of so many tokens, each begun by another text; 0: the texts as they are.

    Raises:
        SystemExit: the data set has no text.
    """
    texts = load(args.dataset, args.data_dir, args.num_prompts if not context else 1000)
    if not texts:
        raise SystemExit(
            f"--dataset {args.dataset}: it is empty; give one with prompts"
        )
    if not context:
        return texts
    encode = AutoTokenizer.from_pretrained(args.model).encode
    found = []
    for first in range(args.num_prompts):
        first %= len(texts)
        text = "\n\n".join(texts[first:] + texts[:first])
        tokens = encode(text)
        tokens *= -(-context // len(tokens))
        found.append({"prompt_token_ids": tokens[:context]})
    return found


def requests(server: str, trees: list[str]) -> dict[str, dict[str, Any] | None]:
    """By tree, `extra_args` of a request to this server: those that it allows."""
    if server == PLAIN:
        return {PLAIN: None}
    own, found = params_of(server), {OFF: {REQUEST_SWITCH: 0}}
    for tree in [*trees, *([] if server in trees else [server])]:
        sizes = sizes_of(tree)
        if all(size <= getattr(own, name) for name, size in sizes.items()):
            found[tree] = {REQUEST_PREFIX + name: v for name, v in sizes.items()}
    return {**found}


def computed(server: str, nodes: int) -> int:
    """Tokens of the CUDA graph that a step of one such tree replays."""
    from vllm_lookahead.engine.v2.cudagraph import tree_batches

    graphs = tree_batches(params_of(server), 1, MAX_TREE_NODES, MAX_TREE_NODES)
    return min((size for _, size in graphs if size >= nodes), default=nodes)


def measure(
    engine: EngineProcess, jobs: list[Any], extra: dict[str, Any] | None, args: Any
) -> Row:
    """Each prompt alone: milliseconds of a step, tokens per step, tokens/s."""
    params = {"max_tokens": args.max_tokens, "temperature": 0, "ignore_eos": True}
    params["extra_args"] = extra
    gaps, tokens, seconds = [], [], 0.0
    for prompt in jobs:
        result = engine.run({"prompts": [prompt], "params": [params]})
        (times,), (steps,) = result["times"], result["steps"]
        gaps += [1e3 * (b - a) for a, b in pairwise(times)]
        tokens += [len(step) for step in steps[1:]]
        seconds += result["seconds"]
    return {
        "step_ms": statistics.median(gaps),
        "tokens_per_step": statistics.mean(tokens),
        "tokens_per_second": len(jobs) * args.max_tokens / seconds,
    }


def serve(server: str, args: argparse.Namespace) -> list[Row]:
    """All that is asked of one server; the median of the turns."""
    options = engine_options(args)
    # Beyond it there is no text, but steps that cost what they would.
    longest = {"max_position_embeddings": args.max_model_len}
    options["hf_overrides"] = longest
    if server != PLAIN:
        options["speculative_config"] = lookahead_config(server)
    cells = [
        (context, tree, extra)
        for context in args.contexts
        for tree, extra in requests(server, args.trees).items()
    ]
    jobs = {context: prompts(args, context) for context in args.contexts}
    print(f"starting {server}", flush=True)
    with TemporaryDirectory() as folder:
        engine = EngineProcess(options, Path(folder) / "log", args.start_limit)
        try:
            for context, _, extra in cells:  # warm up
                measure(engine, jobs[context][:1], extra, args)
            turns = [
                [
                    measure(engine, jobs[context], extra, args)
                    for context, _, extra in cells
                ]
                for _ in range(args.repeats)
            ]
        finally:
            engine.close()
    rows = []
    for number, (context, tree, _) in enumerate(cells):
        mine = [turn[number] for turn in turns]
        row = {name: statistics.median(turn[name] for turn in mine) for name in mine[0]}
        lone = tree in (PLAIN, OFF)
        nodes = 1 if lone else params_of(tree).max_tree_size
        row |= {"server": server, "tree": tree, "context": context, "nodes": nodes}
        if not lone and not args.eager:
            row["graph"] = computed(server, nodes)
        rows.append({**row, "turns": mine})
        print(
            f"{server}, {tree}, {nodes} nodes, context {context or 'as it is'}: "
            f"{row['step_ms']:.2f} ms, {row['tokens_per_step']:.2f} tokens a step, "
            f"{row['tokens_per_second']:.1f} tok/s",
            flush=True,
        )
    return rows


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_engine_options(parser)
    add = parser.add_argument
    add("--servers", nargs="+", default=[PLAIN, SIZES], metavar="plain or W/N/G")
    help_text = "of requests, as far as the server allows; its own always"
    add("--trees", nargs="+", default=[], metavar="W/N/G", help=help_text)
    help_text = "tokens of a prompt; 0: the data set's prompts as they are"
    add("--contexts", nargs="+", type=int, default=[0], metavar="C", help=help_text)
    add("--num-prompts", type=int, default=4)
    add("--max-tokens", type=int, default=96)
    add("--repeats", type=int, default=3, help="turns")
    add("--out", type=Path, required=True)
    add("--resume", action="store_true", help="keep the servers that the output has")
    args = parser.parse_args(arguments)
    longest = args.max_model_len - args.max_tokens
    if max(args.contexts) > longest:
        parser.error(
            f"--contexts {max(args.contexts)}: with --max-tokens {args.max_tokens} and "
            f"--max-model-len {args.max_model_len} at most {longest}; raise the latter"
        )
    args.batch_size = 1
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    result: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "rows": [],
    }
    if args.resume and args.out.exists():
        result["rows"] = json.loads(args.out.read_text())["rows"]
    for server in args.servers:
        if any(row["server"] == server for row in result["rows"]):
            continue
        result["rows"] += serve(server, args)
        args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
