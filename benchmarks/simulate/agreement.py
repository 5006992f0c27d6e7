# SPDX-License-Identifier: Apache-2.0
"""How often the text goes on as it did where its last tokens were met before.

    python -m benchmarks.simulate.agreement --model .models/SmolLM2-135M-Instruct

By how many tokens agree with the newest such place, of the outputs of the runs that
`benchmarks.simulate` has recorded: no model runs.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.commit import commit
from benchmarks.simulate.record import Record
from benchmarks.simulate.run import CACHE

LONGEST = 6
RESULTS = Path(__file__).parents[1] / "results"


def count(text: Sequence[int], first: int) -> tuple[Counter, Counter]:
    """Of the places from `first` on: how many tokens agreed, and where it went on so.

    LONGEST stands for as many or more.
    """
    met, right = Counter[int](), Counter[int]()
    followed: dict[tuple[int, ...], int] = {}
    for at in range(1, len(text)):
        contexts = [tuple(text[at - n : at]) for n in range(1, min(LONGEST, at) + 1)]
        known = [c for c in contexts if c in followed] if at >= first else []
        if known:
            longest = known[-1]
            met[len(longest)] += 1
            right[len(longest)] += followed[longest] == text[at]
        followed.update(dict.fromkeys(contexts, text[at]))
    return met, right


def of_records(records: Iterable[Record], max_tokens: int) -> dict[str, list[int]]:
    """Agreement: places, and places that went on so."""
    met, right = Counter[int](), Counter[int]()
    for record in records:
        text = [*record.prompt, *record.output[:max_tokens]]
        for total, part in zip(
            (met, right), count(text, len(record.prompt)), strict=True
        ):
            total.update(part)
    return {str(n): [met[n], right[n]] for n in range(1, LONGEST + 1)}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="of which there are recordings")
    parser.add_argument("--datasets", default="humaneval,gsm8k,mt-bench")
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "agreement.json")
    args = parser.parse_args()
    name, found = Path(args.model).name, {}
    for temperature in args.temperatures.split(","):
        records: list[Record] = []
        for dataset in args.datasets.split(","):
            file = CACHE / f"{name}-{dataset}-{temperature}-{args.max_tokens}.pt"
            records += torch.load(file, weights_only=False)
        found[temperature] = of_records(records, args.max_tokens)
        for n, (places, right) in found[temperature].items():
            print(f"{temperature}, {n} agree: {places} places, {right / places:.2f}")
    settings = {**vars(args), "output": None, "model": name, "commit": commit()}
    args.output.write_text(json.dumps({"settings": settings, "places": found}) + "\n")


if __name__ == "__main__":
    main()
