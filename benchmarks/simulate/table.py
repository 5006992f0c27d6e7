# SPDX-License-Identifier: Apache-2.0
"""Tables of simulated runs."""

import math
from typing import Any

import numpy as np

# What the drafter is measured against. "propose" is what the package drafted on a GPU
# before: results of it are kept, it does not run any more.
OTHERS = ("lookup", "suffix", "recycling", "logitspec", "paper", "propose")
NEW = ("draft", "forest", "levels")
Cells = dict[str, dict[str, Any]]


def calibration(chances: list[tuple[float, bool]]) -> list[dict[str, float]]:
    """Of each tenth of the estimate: nodes, mean estimate, share accepted."""
    estimate = np.exp([x for x, _ in chances])
    accepted = np.array([ok for _, ok in chances])
    tenth = np.minimum((estimate * 10).astype(int), 9)
    out = []
    for i in range(10):
        inside = tenth == i
        count = int(inside.sum())
        out.append(
            {
                "nodes": count,
                "estimate": float(estimate[inside].sum()) / max(1, count),
                "accepted": float(accepted[inside].sum()) / max(1, count),
            }
        )
    return out


def _cell(cells: Cells, strategy: str, budget: int) -> dict[str, Any] | None:
    return cells.get(strategy, {}).get(str(budget))


def ratios(
    results: dict[tuple[str, float], Cells], new: str, budget: int
) -> list[float]:
    """S of a strategy over that of the best other on the data set, for each of them."""
    out = []
    for cells in results.values():
        ours = _cell(cells, new, budget)
        theirs = [_cell(cells, other, budget) for other in OTHERS]
        known = [cell["S"] for cell in theirs if cell]
        if ours and known:
            out.append(ours["S"] / max(known))
    return out


def print_tables(
    results: dict[tuple[str, float], Cells], strategies: list[str], budgets: list[int]
) -> None:
    head = "".join(f"{f'T={b}':>12}" for b in budgets)
    for (dataset, temperature), cells in results.items():
        print(
            f"\n{dataset}, temperature {temperature:g}: S @ mean nodes\n{'':28}{head}"
        )
        for strategy in strategies:
            line = ""
            for budget in budgets:
                cell = _cell(cells, strategy, budget)
                text = f"{cell['S']:.2f} @{cell['mean nodes']:.0f}" if cell else "-"
                line += f"{text:>12}"
            print(f"{strategy:28}{line}")
        for new in (name for name in strategies if name in NEW):
            here = {(dataset, temperature): cells}
            each = [ratios(here, new, budget) for budget in budgets]
            line = "".join(f"{r[0] if r else math.nan:12.2f}" for r in each)
            print(f"{f'{new} over best other':28}{line}")
    for temperature in sorted({t for _, t in results}):
        of = {key: cells for key, cells in results.items() if key[1] == temperature}
        print(f"\ntemperature {temperature:g}: mean S over data sets\n{'':28}{head}")
        for strategy in strategies:
            line = ""
            for budget in budgets:
                values = [_cell(cells, strategy, budget) for cells in of.values()]
                speeds = [cell["S"] for cell in values if cell]
                whole = len(speeds) == len(of)
                text = f"{np.mean(speeds):.3f}" if whole else "-"
                line += f"{text:>12}"
            print(f"{strategy:28}{line}")
        for new in (name for name in strategies if name in NEW):
            for label, reduce in (("mean", np.mean), ("least", min)):
                line = ""
                for budget in budgets:
                    over = ratios(of, new, budget)
                    line += f"{reduce(over) if over else math.nan:12.3f}"
                print(f"{f'{new} over best other, {label}':28}{line}")
        for strategy in strategies:
            print_calibration(of, strategy, budgets)


def print_calibration(
    results: dict[tuple[str, float], Cells], strategy: str, budgets: list[int]
) -> None:
    """Share accepted less estimate of each tenth, over the data sets, in points."""
    for budget in budgets:
        found = [_cell(cells, strategy, budget) for cells in results.values()]
        tables = [
            cell["calibration"] for cell in found if cell and "calibration" in cell
        ]
        if not tables:
            return
        if budget == budgets[0]:
            print(f"{strategy}: accepted less estimated, in points, by tenth")
        line = ""
        for rows in zip(*tables, strict=True):
            nodes = sum(row["nodes"] for row in rows)
            gap = sum((r["accepted"] - r["estimate"]) * r["nodes"] for r in rows)
            line += f"{100 * gap / nodes if nodes else math.nan:8.1f}"
        print(f"  T={budget:<10}{line}")
