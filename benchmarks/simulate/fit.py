# SPDX-License-Identifier: Apache-2.0
"""Fit the weights by which sources add up, on prompts held out.

    python -m benchmarks.simulate.fit --model .models/SmolLM2-135M-Instruct \\
        --data-dir DATA --strategies draft,forest,forest-last

Multinomial regression: of every node that was reached, which token followed, given what
each source had to say. Odds of the package's sources add up; of a forest's, logarithms
do (logistic regression). A strategy's weights are those of its own options. Printed are
the weights, and by how far estimates miss on other prompts held out.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.simulate.forest import Forest, Weights
from benchmarks.simulate.ours import Ours
from benchmarks.simulate.protocol import Answers, Strategy, Tree
from benchmarks.simulate.record import Model, Oracle
from benchmarks.simulate.run import oracles, parser_of, serve
from benchmarks.simulate.strategies import WEIGHTS, start, weighted
from benchmarks.simulate.strategies import weights as fitted_weights
from benchmarks.simulate.table import calibration

# What the package's names of weights begin with that are of a source.
SOURCES = ("text", "answer", "bigram")
# Per sample: keeps weights that the samples say nothing about where they are.
RIDGE = 1e-3


class Samples:
    """What was known at each node reached, and what followed.

    Attributes:
        names: of the weights.
        odds_add_up: whether sources are a mixture.
        rows: [candidates + 1, len(names)] of each sample, the other tokens' last.
        followed: which of them did.
    """

    def __init__(self, names: Sequence[str], odds_add_up: bool) -> None:
        self.names, self.odds_add_up = list(names), odds_add_up
        self.rows: list[np.ndarray] = []
        self.followed: list[int] = []

    def watch(
        self, strategy: Strategy, tree: Tree, answers: Answers, path: list[int]
    ) -> None:
        assert isinstance(strategy, Forest | Ours)
        names = self.names
        temperature = strategy.request.temperature
        emitted = [answers.sampled[node] for node in path]
        for depth, token in enumerate(emitted):
            index: dict[int, int] = {}
            cells: list[tuple[int, int, float]] = []
            for name, row in strategy.evidence(emitted[:depth]):
                column = names.index(name)
                for candidate, x in row.items():
                    at = index.setdefault(candidate, len(index))
                    cells.append((at, column, x))
            rows = np.zeros((len(index) + 1, len(names)), np.float32)
            for at, column, x in cells:
                rows[at, column] += x
            if temperature > 0 and strategy.reads_noise:
                noise = strategy.request.noise[strategy.number + depth]
                rows[:-1, names.index("noise")] = temperature * noise[list(index)]
            rows[-1, names.index("other")] = 1
            rows[-1, names.index("other by temperature")] = temperature
            if "other by depth" in names:
                rows[-1, names.index("other by depth")] = min(depth, 4)
            self.rows.append(rows)
            self.followed.append(index.get(token, len(index)))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """rows [n, most, len(names)], missing [n, most] bool, followed [n]."""
        shape = len(self.rows), max(map(len, self.rows))
        rows = torch.zeros(*shape, len(self.names))
        missing = torch.ones(shape, dtype=torch.bool)
        for i, sample in enumerate(self.rows):
            rows[i, : len(sample)] = torch.from_numpy(sample)
            missing[i, : len(sample)] = False
        return rows, missing, torch.tensor(self.followed)

    def scores(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[n, most] of the candidates, by `rows` of `tensors`."""
        terms = rows * weights
        if not self.odds_add_up:
            return terms.sum(-1)
        added, said = terms.clone(), []
        for source in SOURCES:
            of = [i for i, name in enumerate(self.names) if name.startswith(source)]
            silent = (rows[..., of] == 0).all(-1)
            said.append(terms[..., of].sum(-1).masked_fill(silent, -torch.inf))
            added[..., of] = 0
        nobody = torch.isinf(torch.stack(said)).all(0)
        odds = torch.stack([x.masked_fill(nobody, 0.0) for x in said]).logsumexp(0)
        return odds.masked_fill(nobody, 0.0) + added.sum(-1)


def fit(samples: Samples, start: Weights) -> dict[str, float]:
    """The weights that say most of what did follow."""
    rows, missing, followed = samples.tensors()
    first = torch.tensor([start[name] for name in samples.names])
    weights = first.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = samples.scores(rows, weights).masked_fill(missing, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits, followed)
        loss = loss + RIDGE * (weights - first).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return dict(zip(samples.names, weights.detach().tolist(), strict=True))


def check(samples: Samples, weights: Weights) -> dict[str, Any]:
    """Calibration overall and of the tokens that each source speaks for."""
    rows, missing, followed = samples.tensors()
    names = samples.names
    values = torch.tensor([weights[name] for name in names])
    chances = samples.scores(rows, values).masked_fill(missing, -torch.inf)
    chances = chances.log_softmax(-1)
    hit = torch.zeros_like(missing)
    hit[torch.arange(len(hit)), followed] = True
    # The last candidate of each sample is all the other tokens.
    of = ~missing
    of[torch.arange(len(of)), of.sum(1) - 1] = False
    out: dict[str, Any] = {}
    for name in ["all", *names]:
        inside = of if name == "all" else of & (rows[..., names.index(name)] != 0)
        if inside.any():
            pairs = zip(chances[inside].tolist(), hit[inside].tolist(), strict=True)
            out[name] = calibration(list(pairs))
    return out


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--strategies", default="forest")
    add("--start", default="", help="strategy whose weights grow the first trees")
    add("--budgets", default="32")
    add("--skip-prompts", type=int, default=4, help="those that are measured")
    add("--num-prompts", type=int, default=4, help="of each data set, after those")
    add("--rounds", type=int, default=2, help="trees depend on weights: fit again")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    model = Model.load(args.model)
    requests: list[Oracle] = []
    for dataset in args.datasets.split(","):
        for temperature in map(float, args.temperatures.split(",")):
            count = args.skip_prompts + args.num_prompts
            found, bigrams = oracles(
                model,
                args.model,
                dataset,
                args.data_dir,
                temperature,
                count,
                args.max_tokens,
            )
            requests += found[args.skip_prompts :]
    for name in args.strategies.split(","):
        weights = first = start(name)
        if args.start:
            weights = fitted_weights(args.start)
        for _ in range(args.rounds):
            kind = list(first), name.startswith("draft")
            samples, tested = Samples(*kind), Samples(*kind)
            for i, oracle in enumerate(requests):
                # Every fourth request says how well the rest's weights hold.
                watch = (tested if i % 4 == 3 else samples).watch
                for budget in map(int, args.budgets.split(",")):
                    make = weighted(name, budget, weights)
                    serve(oracle, make, budget, args.max_tokens, bigrams, watch)
            weights = fit(samples, first)
        table = check(tested, weights)
        samples.rows += tested.rows
        samples.followed += tested.followed
        weights = fit(samples, first)
        print(f"{name}, {len(samples.rows)} samples")
        for term, weight in weights.items():
            line = ""
            for tenth in table.get(term, []):
                gap = tenth["accepted"] - tenth["estimate"]
                line += f"{100 * gap:8.1f}" if tenth["nodes"] else f"{'-':>8}"
            print(f"  {term:22}{weight:8.3f}{line}", flush=True)
        gaps = [100 * (t["accepted"] - t["estimate"]) for t in table["all"]]
        print(f"  {'all':30}" + "".join(f"{gap:8.1f}" for gap in gaps))
        fitted = json.loads(WEIGHTS.read_text()) if WEIGHTS.exists() else {}
        fitted[name] = {"weights": weights, "samples": len(samples.rows)}
        fitted[name]["calibration"] = table
        WEIGHTS.write_text(json.dumps(fitted, indent=1) + "\n")


if __name__ == "__main__":
    main()
