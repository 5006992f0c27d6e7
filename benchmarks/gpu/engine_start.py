# SPDX-License-Identifier: Apache-2.0
"""Does plain vLLM start here, does lookahead, and what do they choose.

    python -m benchmarks.gpu.engine_start --model MODEL --out start.json

Exits with an error if one does not start or generate; the end of its log is in the
JSON. With `--resume` an engine that answered, by the same JSON, is not started again.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine_process import EngineProcess
from benchmarks.gpu.engine_correctness import add_engine_options, engines, generate
from benchmarks.gpu.names import SIZES
from benchmarks.prompts import load

# What vLLM's log says of itself.
FACTS = {
    "runner": r"Using (V\d) Model Runner",
    "attention": r"Using (\w+ attention backend|FlashAttention version \d)",
    "graphs": r"(Graph capturing finished.*)",
    "lookahead": r"(Lookahead is on.*)",
    "bigrams": r"(Asked the model what follows.*)",
}


def facts(log: str) -> dict[str, list[str]]:
    """What the log says, in order; nothing of what it does not mention."""
    found = {name: re.findall(pattern, log) for name, pattern in FACTS.items()}
    return {name: list(dict.fromkeys(said)) for name, said in found.items() if said}


def start(options: dict[str, Any], texts: list[str], args: Any) -> dict[str, Any]:
    """Start an engine, generate, and say how that went."""
    with tempfile.TemporaryDirectory() as folder:
        log, begun = Path(folder) / "log", time.monotonic()
        result: dict[str, Any] = {}
        try:
            engine = EngineProcess(options, log, args.start_limit)
            result["seconds_to_start"] = time.monotonic() - begun
            try:
                result |= generate(engine, texts, args)
            finally:
                engine.close()
        except RuntimeError as error:
            result["failed"] = str(error).splitlines()[-1]  # the cause
        text = log.read_text(errors="replace")
        print(text, flush=True)
        if "failed" in result:
            result["log"] = text.splitlines()[-40:]
        return {**result, **facts(text)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_engine_options(parser)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--sizes", default=SIZES, metavar="W/N/G")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    help_text = "keep the engines that answered, by --out"
    parser.add_argument("--resume", action="store_true", help=help_text)
    args = parser.parse_args(arguments)
    texts = load(args.dataset, args.data_dir, args.num_prompts)
    started: dict[str, Any] = {}
    if args.resume and args.out.exists():
        before = json.loads(args.out.read_text())["engines"]
        started = {n: result for n, result in before.items() if "failed" not in result}
    for name, options in engines(args).items():
        if name in started:
            continue
        print(f"starting {name}", flush=True)
        started[name] = start(options, texts, args)
        args.out.write_text(json.dumps({"engines": started}) + "\n")
    failed = [name for name, result in started.items() if "failed" in result]
    if failed:
        raise SystemExit(f"did not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
