# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of a batch whose requests share its nodes: evenly, or by rank.

    python -m benchmarks.simulate.batch --model .models/SmolLM2-135M-Instruct \\
        --data-dir DATA

What `python -m benchmarks.simulate` records, all of it as one batch: the prompts of
each data set, greedy and at temperature 0.8. Every request grows a whole tree each
step; of all of them as many nodes are fed as the budget says for each request that
still runs, the root among them. "even" feeds each its likeliest ones, as many as any
other; "ranked" the likeliest of the batch; "weighted" divides the chances of a request
by the tokens that they add up to, before nodes are ranked, "weighted twice" by their
square.
"""

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commit import commit
from benchmarks.simulate.ours import Ours
from benchmarks.simulate.protocol import Bigrams, Request, Tree
from benchmarks.simulate.record import Model, Oracle
from benchmarks.simulate.run import Served, oracles, parser_of, serve
from vllm_lookahead.engine.config import GPU_DEFAULTS as SIZES

Share = Callable[[Sequence[np.ndarray], int], list[int]]


def evenly(chances: Sequence[np.ndarray], nodes: int) -> list[int]:
    """Nodes of each request, the root among them: the same for all."""
    share, left = divmod(nodes, len(chances))
    return [share + (i < left) for i in range(len(chances))]


def ranked(chances: Sequence[np.ndarray], nodes: int) -> list[int]:
    """So many that the batch has the likeliest of all; each request has its root."""
    owner = np.repeat(np.arange(len(chances)), [len(c) for c in chances])
    order = np.argsort(-np.concatenate(chances), kind="stable")
    fed = owner[order[: nodes - len(chances)]]
    return (1 + np.bincount(fed, minlength=len(chances))).tolist()


def weighted(chances: Sequence[np.ndarray], nodes: int, power: float) -> list[int]:
    """As `ranked`, a node counting the less the more its request is going to say."""
    return ranked([c / (1 + c.sum()) ** power for c in chances], nodes)


SHARES: dict[str, Share] = {
    "even": evenly,
    "ranked": ranked,
    "weighted": partial(weighted, power=1.0),
    "weighted twice": partial(weighted, power=2.0),
}


class Batch:
    """Requests in threads of their own, which step together.

    Attributes:
        steps: of the batch.
    """

    def __init__(self, share: Share, size: int, nodes: int) -> None:
        """
        Args:
            share: nodes of each request by the chances of all.
            size: requests.
            nodes: of each request, on average.
        """
        self.share, self.running, self.nodes = share, size, nodes
        self.drafted: dict[int, np.ndarray] = {}
        self.fed: dict[int, int] = {}
        self.steps = 0
        self.changed = threading.Condition()

    def feed(self, request: int, chances: np.ndarray) -> int:
        """Nodes of a request's tree, once all that run have drafted."""
        with self.changed:
            self.drafted[request] = chances
            self._step()
            self.changed.wait_for(lambda: request in self.fed)
            return self.fed.pop(request)

    def end(self) -> None:
        """A request has ended."""
        with self.changed:
            self.running -= 1
            self._step()

    def _step(self) -> None:
        if not self.running or len(self.drafted) < self.running:
            return
        drafted = dict(sorted(self.drafted.items()))
        self.drafted.clear()
        nodes = self.share(list(drafted.values()), self.nodes * self.running)
        self.fed.update(zip(drafted, nodes, strict=True))
        self.steps += 1
        self.changed.notify_all()


class Sharing(Ours):
    """Ours, in a batch."""

    def __init__(self, request: Request, batch: Batch, number: int) -> None:
        sizes = SIZES.window_size, SIZES.ngram_size, SIZES.verification_set_size
        super().__init__(request, sizes)
        self.shared, self.mine = batch, number

    def draft(self, budget: int) -> Tree:
        tree = super().draft(budget)
        fed = self.shared.feed(self.mine, np.exp(self.chances[1:]))
        size = min(fed, len(tree.tokens))
        self.tree = self.tree.first_nodes(size)
        self.tree.num_nodes = self.tree.num_nodes.clamp(max=size)
        self.chances = self.chances[:size]
        return Tree(tree.tokens[:size], tree.parents[:size], size)


def run(
    requests: list[tuple[Oracle, tuple[Bigrams, Bigrams]]],
    share: Share,
    nodes: int,
    max_tokens: int,
) -> tuple[list[Served], int]:
    """All requests as one batch.

    Returns:
        What each was served, and the steps that the batch took.
    """
    batch = Batch(share, len(requests), nodes)
    served: dict[int, Served] = {}

    def one(i: int) -> None:
        oracle, bigrams = requests[i]

        def make(request: Request) -> Sharing:
            return Sharing(request, batch, i)

        try:
            served[i] = serve(oracle, make, SIZES.node_budget, max_tokens, bigrams)
        finally:
            batch.end()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [served[i] for i in range(len(requests))], batch.steps


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--nodes", default="4,8,16,32", help="of each request, the root among them")
    add("--num-prompts", type=int, default=4, help="of each data set, the first ones")
    add("--output-dir", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    name, model = Path(args.model).name, Model.load(args.model)
    limits = args.num_prompts, args.max_tokens
    requests = []
    for dataset in args.datasets.split(","):
        for temperature in map(float, args.temperatures.split(",")):
            known = model, args.model, dataset, args.data_dir, temperature
            found, bigrams = oracles(*known, *limits)
            requests += [(oracle, bigrams) for oracle in found]
    raw: dict[str, Any] = {
        "settings": {
            "model": name,
            "datasets": args.datasets,
            "temperatures": args.temperatures,
            "requests": len(requests),
            "max_tokens": args.max_tokens,
            "commit": commit(),
        },
        "cells": {},
    }
    file = args.output_dir / f"simulate-{name}-batch.json"
    for nodes in map(int, args.nodes.split(",")):
        for label, share in SHARES.items():
            served, steps = run(requests, share, nodes, args.max_tokens)
            tokens = sum(len(step) for one in served for step in one.tokens)
            fed = [n for one in served for n in one.nodes]
            cell = {
                "S": tokens / len(fed),
                "steps of the batch": steps,
                "mean nodes": float(np.mean(fed)),
                "widest": max(fed),
            }
            raw["cells"].setdefault(str(nodes), {})[label] = cell
            print(nodes, label, cell, flush=True)
            file.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
