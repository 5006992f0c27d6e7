# SPDX-License-Identifier: Apache-2.0
"""Strategies by name, each with the settings that are tried at a budget.

"draft" is what the package drafts, "draft+alone" with bigrams of tokens that nothing
precedes, "draft+salt" reading earlier requests' pages as well. "forest" takes options:
"forest-last" is without that source, "forest+window" with it; "levels" is the forest
grown level by level, and takes the same ones. "own" is "draft" in plain Python, with
more sources (`experiment.py`).
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.simulate.experiment import START as EXPERIMENT_START
from benchmarks.simulate.experiment import WINDOW, Experiment
from benchmarks.simulate.forest import START, Forest, Weights
from benchmarks.simulate.ours import Ours, Tenant
from benchmarks.simulate.paper import Paper
from benchmarks.simulate.protocol import Request, Strategy
from benchmarks.simulate.recycling import Recycling
from benchmarks.simulate.retrieval import LogitSpec, PromptLookup, Suffix
from benchmarks.simulate.sources import Options
from vllm_lookahead.core.draft.estimate import WEIGHTS as DRAFT_WEIGHTS

Make = Callable[[Request], Strategy]
BASELINES = "lookup,suffix,recycling,logitspec,paper,draft"
WEIGHTS = Path(__file__).parents[1] / "results" / "simulate-weights.json"
# Of levels: nodes that get children, and how many each.
BEAM, SUCCESSORS = 8, 8


def options(name: str) -> Options:
    """Those that a name asks for; numbers are values: "forest+alternatives4-last"."""
    changes: dict[str, Any] = {}
    for sign, option, value in re.findall(r"([+-])([a-z_]+)(\d*)", name):
        changes[option] = int(value) if value else sign == "+"
    return replace(Options(), **changes)


def weights(name: str) -> Weights:
    """Those fitted for the options, or what fitting starts from."""
    fitted = json.loads(WEIGHTS.read_text()) if WEIGHTS.exists() else {}
    key = re.sub(r"^levels", "forest", name)
    return fitted.get(key, {}).get("weights", start(name))


def start(name: str) -> Weights:
    """What fitting starts from."""
    if name.startswith("own"):
        return EXPERIMENT_START
    return DRAFT_WEIGHTS if name.startswith("draft") else START


def weighted(name: str, budget: int, weights: Weights) -> Make:
    """A drafter by its weights."""
    if name.startswith("draft"):
        sizes = sizes_of(budget)
        return partial(Ours, sizes=sizes, weights=weights, alone=name != "draft")
    if name.startswith("own"):
        return experiment(name, budget, weights)
    return partial(Forest, options=options(name), weights=weights)


def experiment(name: str, budget: int, weights: Weights) -> Make:
    """The drafter with what a name adds to it."""
    added = dict(re.findall(r"~([a-z]+)(\d*)", name))
    w, n = WINDOW if "window" in added else (0, sizes_of(budget)[1])
    return partial(
        Experiment,
        sizes=(w, n, sizes_of(budget)[2]),
        weights=weights,
        longest=int(added.get("context", 3)),
        tail="tail" in added,
        columns="columns" in added,
    )


def sizes_of(budget: int) -> tuple[int, int, int]:
    """W, N and G that leave the drafter its choice of so many nodes."""
    return 0, 13, min(42, max(1, budget - 1))


def settings(name: str, budget: int) -> dict[str, Make]:
    """What is tried at this budget; the best one counts."""
    if name == "lookup":
        return {f"{n}..5": partial(PromptLookup, least=n) for n in (1, 2)}
    if name == "suffix":
        return {
            "as vLLM": Suffix,
            "up to the budget": partial(Suffix, factor=0.0, least=0.0),
        }
    if name == "recycling":
        return {"": Recycling}
    if name == "logitspec":
        return {"": LogitSpec}
    if name == "paper":
        # (N - 1) (W + G) nodes; N = 2 has no window to speak of.
        sizes = [(budget // (2 * n - 2), n, budget // (2 * n - 2)) for n in (3, 5)]
        return {"/".join(map(str, s)): partial(Paper, sizes=s) for s in sizes if s[0]}
    if name == "draft+salt":
        tenant = Tenant(sizes_of(budget))
        return {"": partial(Ours, sizes=sizes_of(budget), tenant=tenant)}
    if name in ("draft", "draft+alone"):
        return {"": partial(Ours, sizes=sizes_of(budget), alone=name != "draft")}
    if re.match(r"own(~|$)", name):
        return {"": experiment(name, budget, weights(name))}
    if re.match(r"(forest|levels)([+-]|$)", name):
        beam, most = (BEAM, SUCCESSORS) if name.startswith("levels") else (None, None)
        known = options(name), weights(name), beam, most
        return {"": lambda request: Forest(request, *known)}
    raise SystemExit(f"--strategies: {name} is none of {BASELINES},forest,levels")
