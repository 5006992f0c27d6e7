# SPDX-License-Identifier: Apache-2.0
"""Engine speed on outputs that do not loop: `benchmarks/offline.py`, on more prompts.

    python -m benchmarks.gpu.engine_distinct --min-distinct 0.6 ... --output raw.json

A small model's greedy text soon loops, and drafts for it are easily right. So each
prompt is also cut short three times, and of them all offline.py keeps those whose
plain output does not loop. All options but the data set's are its own.
"""

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.engine_correctness import PROMPTS, beginnings
from benchmarks.prompts import load

BENCHMARKS = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", default=str(PROMPTS))
    parser.add_argument("--data-dir", help="folder of humaneval/, gsm8k/, mt_bench/")
    parser.add_argument("--num-prompts", type=int, default=16, help="to cut short")
    args, rest = parser.parse_known_args(arguments)
    texts = beginnings(load(args.dataset, args.data_dir, args.num_prompts))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(args.dataset).stem}-beginnings.jsonl"
        path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
        sys.path.insert(0, str(BENCHMARKS))
        program = str(BENCHMARKS / "offline.py")
        sys.argv = [program, "--dataset", str(path), "--num-prompts", str(len(texts))]
        sys.argv += rest
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
