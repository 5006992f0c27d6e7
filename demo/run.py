# SPDX-License-Identifier: Apache-2.0
"""The same text twice: plain vLLM, then lookahead, coloured by decoding step."""

import json
import os
import shutil
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from engine_process import EngineProcess  # type: ignore  # noqa: E402

ENGINE: dict[str, Any] = {
    "model": str(HERE / "model"),
    "dtype": "float32",  # in fp32 both texts are the same to the token
    "max_model_len": 1024,
    "max_num_seqs": 1,
    "kv_cache_memory_bytes": 64 << 20,
}
NUM_PROMPTS = 4
SAMPLING = {"max_tokens": 120, "temperature": 0.8}
# Neighbouring steps get unlike colours.
COLOURS = ("36", "33", "35", "32")


def is_fancy() -> bool:
    """Colour for a terminal, unless NO_COLOR says otherwise (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def mark(pieces: list[str], fancy: bool) -> str:
    """The text of a run, a piece per step; without colour, bars between steps."""
    if not fancy:
        return "|".join(pieces)
    coloured = []
    for i, piece in enumerate(pieces):
        code = f"\033[{COLOURS[i % len(COLOURS)]}m"
        # A colour must not run on into the next line.
        coloured.append(code + piece.replace("\n", f"\033[0m\n{code}") + "\033[0m")
    return "".join(coloured)


def pieces(tokenizer: Any, steps: list[list[int]]) -> list[str]:
    """What each step added to the decoded text."""
    texts, tokens, before = [], [], ""
    for step in steps:
        tokens += step
        text = tokenizer.decode(tokens)
        texts.append(text[len(before) :])
        before = text
    return texts


def generate(name: str, options: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    print(f"Starting vLLM, {name} ...", flush=True)
    jobs = [
        {"prompts": [text], "params": [{**SAMPLING, "seed": i}]}
        for i, text in enumerate(texts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineProcess(ENGINE | options, Path(folder) / "log")
        try:
            engine.run(jobs[0])  # warm up
            results = [engine.run(job) for job in jobs]
        finally:
            engine.close()
    steps = [result["steps"][0] for result in results]
    return {
        "steps": steps,
        "seconds": sum(result["seconds"] for result in results),
        "tokens": sum(len(tokens) for s in steps for tokens in s),
    }


def show(title: str, prompt: str, text: str, width: int) -> None:
    print(f"--- {title} ".ljust(width, "-"))
    print(prompt, end="")
    print(text)


def main() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    rows = (BENCHMARKS / "python_prompts.jsonl").read_text().splitlines()
    texts = [json.loads(row)["prompt"] for row in rows[:NUM_PROMPTS]]
    plain = generate("plain", {}, texts)
    lookahead = generate(
        "with lookahead", {"speculative_config": {"method": "lookahead"}}, texts
    )

    fancy = is_fancy()
    width = min(88, shutil.get_terminal_size().columns)
    for i, (prompt, one, other) in enumerate(
        zip_longest(texts, plain["steps"], lookahead["steps"]), 1
    ):
        show(f"{i}. plain", prompt, tokenizer.decode(sum(one, [])), width)
        legend = "a colour per step" if fancy else "a bar between steps"
        marked = mark(pieces(tokenizer, other), fancy)
        show(f"{i}. lookahead, {legend}", prompt, marked, width)
        same = sum(one, []) == sum(other, [])
        print(f"--- the same {len(sum(one, []))} tokens: {'yes' if same else 'NO'}\n")

    print(f"{'':10} {'tokens/s':>9} {'steps':>6} {'tokens per step':>16} {'speed':>7}")
    base = plain["tokens"] / plain["seconds"]
    for name, run in (("plain", plain), ("lookahead", lookahead)):
        speed = run["tokens"] / run["seconds"]
        steps = sum(map(len, run["steps"]))
        print(
            f"{name:10} {speed:9.1f} {steps:6d} {run['tokens'] / steps:16.2f} "
            f"{speed / base:6.2f}x"
        )


if __name__ == "__main__":
    main()
