# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of drafting strategies on one model, at equal numbers of nodes.

    python -m benchmarks.simulate --model .models/SmolLM2-135M-Instruct \\
        --data-dir DATA --strategies lookup,recycling,forest --budgets 8,16,32,64

A transformers model in fp32, one request at a time, greedy and with the sampler's noise
known beforehand. Every run must say what plain decoding says. Steps and tokens are
those after the prefill and its token; nodes are all that a step feeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commit import commit
from benchmarks.simulate.protocol import Bigrams
from benchmarks.simulate.record import Model, Oracle
from benchmarks.simulate.run import Served, oracles, parser_of, serve
from benchmarks.simulate.strategies import BASELINES, settings
from benchmarks.simulate.table import calibration, print_tables


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--strategies", default=f"{BASELINES},forest,levels")
    add("--budgets", default="4,8,16,32,64,120", help="nodes fed, the root among them")
    add("--num-prompts", type=int, default=4, help="of each data set, the first ones")
    add("--output-dir", type=Path, default=Path(__file__).parents[1] / "results")
    add("--print-only", action="store_true", help="tables of the results there are")
    return parser.parse_args()


def measure(
    served: list[Oracle],
    bigrams: tuple[Bigrams, Bigrams],
    name: str,
    budget: int,
    max_tokens: int,
) -> dict[str, Any]:
    """The best setting's result, and S of each setting."""
    tried: dict[str, list[Served]] = {
        label: [serve(o, make, budget, max_tokens, bigrams) for o in served]
        for label, make in settings(name, budget).items()
    }
    speeds = {label: speed(runs) for label, runs in tried.items()}
    best = max(speeds, key=lambda label: speeds[label])
    runs = tried[best]
    out = {
        "S": speeds[best],
        "mean nodes": float(np.mean([n for run in runs for n in run.nodes])),
        "setting": best,
        "settings": speeds,
        "tokens": [run.tokens for run in runs],
        "nodes": [run.nodes for run in runs],
    }
    chances = [c for run in runs for c in run.chances]
    return out | ({"calibration": calibration(chances)} if chances else {})


def speed(runs: list[Served]) -> float:
    tokens = sum(len(step) for run in runs for step in run.tokens)
    return tokens / sum(len(run.tokens) for run in runs)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    name = Path(args.model).name
    budgets = [int(b) for b in args.budgets.split(",")]
    temperatures = [float(t) for t in args.temperatures.split(",")]
    strategies, datasets = args.strategies.split(","), args.datasets.split(",")
    model = None if args.print_only else Model.load(args.model)
    made_of = commit()  # before a result is written over another
    results: dict[tuple[str, float], dict[str, Any]] = {}
    for dataset in datasets:
        for temperature in temperatures:
            stem = f"simulate-{name}-{dataset}-{temperature:g}"
            file = args.output_dir / f"{stem}.json"
            raw = json.loads(file.read_text()) if file.exists() else {"cells": {}}
            if model:
                run = oracles(
                    model,
                    args.model,
                    dataset,
                    args.data_dir,
                    temperature,
                    args.num_prompts,
                    args.max_tokens,
                )
                raw["settings"] = {
                    "model": name,
                    "dataset": dataset,
                    "temperature": temperature,
                    "num_prompts": args.num_prompts,
                    "max_tokens": args.max_tokens,
                }
                for strategy in strategies:
                    for budget in budgets:
                        cell = measure(*run, strategy, budget, args.max_tokens)
                        cell["commit"] = made_of
                        raw["cells"].setdefault(strategy, {})[str(budget)] = cell
                        print(
                            f"{dataset}, {temperature:g}, {strategy}, {budget}: "
                            f"{cell['S']:.2f} @{cell['mean nodes']:.0f} "
                            f"{cell['settings'] if cell['setting'] else ''}",
                            flush=True,
                        )
                        file.write_text(json.dumps(raw) + "\n")
            results[dataset, temperature] = raw["cells"]
    print_tables(results, strategies, budgets)


if __name__ == "__main__":
    main()
