# SPDX-License-Identifier: Apache-2.0
"""Draw the attention kernels' time against context, a panel for each tree size.

    python -m benchmarks.gpu.plot results.json --output kernel-times.svg

It takes what `kernels` writes and the results that `run_all` keeps.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any


def attention_results(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of several runs, each contender at a shape once: the first run's."""
    results: dict[tuple, dict[str, Any]] = {}
    for record in records:
        # As `kernels` writes them, or as `run_all` keeps them.
        for r in (record.get("result", record) or {}).get("attention", []):
            keys = ("contender", "size", "context", "num_heads", "num_kv_heads")
            results.setdefault(tuple(r[key] for key in keys), r)
    return list(results.values())


def plot(results: list[dict[str, Any]], path: Path, title: str = "") -> bool:
    """Write the picture, in the format of the path's suffix, if there is a way."""
    try:
        import_module("matplotlib").use("Agg")
        pyplot = import_module("matplotlib.pyplot")
    except ImportError:
        print(f"{path} not drawn: matplotlib is not installed; it is in [bench]")
        return False
    timed = [r for r in results if "us" in r]
    if not timed:
        print(f"{path} not drawn: nothing was timed")
        return False
    heads = sorted({(r["num_heads"], r["num_kv_heads"]) for r in timed}, reverse=True)
    sizes = sorted({r["size"] for r in timed})
    names = list(dict.fromkeys(r["contender"] for r in timed))
    grid = (len(heads), len(sizes))
    figure, panels = pyplot.subplots(
        *grid, figsize=(4 * grid[1], 3.2 * grid[0]), squeeze=False, sharex=True
    )
    for row, (hq, hkv) in zip(panels, heads, strict=True):
        for panel, size in zip(row, sizes, strict=True):
            for number, name in enumerate(names):
                line = sorted(
                    (r["context"], r["us"])
                    for r in timed
                    if (r["num_heads"], r["num_kv_heads"]) == (hq, hkv)
                    and (r["size"], r["contender"]) == (size, name)
                )
                if line:
                    x, y = zip(*line, strict=True)
                    panel.loglog(x, y, marker=".", color=f"C{number}", label=name)
            panel.set_title(f"T={size}, {hq} heads on {hkv}", fontsize=9)
            panel.grid(alpha=0.3)
        row[0].set_ylabel("microseconds")
    for panel in panels[-1]:
        panel.set_xlabel("context")
    # The widest tree's panel: some contenders are only timed there.
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--output", type=Path, default=Path("kernel-times.svg"))
    args = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for path in args.results:
        found = json.loads(path.read_text())
        records += [found] if "attention" in found else found.values()
    about = {**records[0], **records[0].get("about", {})}
    title = about.get("gpu") or about.get("device", "")
    if plot(attention_results(records), args.output, title):
        print(args.output)


if __name__ == "__main__":
    main()
