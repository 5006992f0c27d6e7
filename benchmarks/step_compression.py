# SPDX-License-Identifier: Apache-2.0
"""Tokens per step of our lookahead beside the paper's, on one model and its prompts.

    python benchmarks/step_compression.py --model demo/model \\
        --datasets humaneval,gsm8k,mt-bench --data-dir DATA

No engine: a transformers forward in fp32, greedy, drives the paper's algorithm
(`paper_lookahead.py`), with and without n-grams of the text in its pool, and ours
(`our_lookahead.py`). Each must say what plain decoding says. Steps and tokens
are those after the prefill and its token.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import prompts as prompt_sets  # type: ignore[import-not-found]
import torch
from our_lookahead import OurLookahead, ask  # type: ignore[import-not-found]
from paper_lookahead import PaperLookahead  # type: ignore[import-not-found]
from tree_model import Draft, TreeModel  # type: ignore[import-not-found]

from vllm_lookahead.params import LookaheadParams


class Method(Protocol):
    """Drafts for one request; the first draft goes with the prefill."""

    def propose(self) -> Draft: ...

    def accept(self, sampled: list[int]) -> tuple[list[int], list[int]]: ...


class Plain:
    """One token per step."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.root = prompt[-1]

    def propose(self) -> Draft:
        return Draft.from_parents([self.root], [-1])

    def accept(self, sampled: list[int]) -> tuple[list[int], list[int]]:
        self.root = sampled[0]
        return [self.root], [0]


def decode(
    model: TreeModel, prompt: list[int], method: Method, max_tokens: int
) -> list[list[int]]:
    """Generate until an EOS id or `max_tokens`: the tokens of each step.

    The first step is the prefill's and has one token.
    """
    model.prefill(prompt[:-1])
    steps: list[list[int]] = []
    num_tokens = 0
    while num_tokens < max_tokens:
        emitted, path = method.accept(model.forward(method.propose()))
        model.keep(path)
        emitted = emitted[: max_tokens - num_tokens]
        ends = [i for i, token in enumerate(emitted) if token in model.eos_ids]
        if ends:
            emitted = emitted[: ends[0] + 1]
        steps.append(emitted)
        num_tokens += len(emitted)
        if ends:
            break
    return steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default="demo/model", help="any model that transformers loads")
    add("--datasets", default=str(Path(__file__).parent / "python_prompts.jsonl"))
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--num-prompts", type=int, default=12)
    add("--max-tokens", type=int, default=128)
    add("--sizes", default="15/5/15", metavar="W/N/G")
    add("--block-size", type=int, default=16, help="tokens of a K/V block")
    add("--seed", type=int, default=0, help="of the paper's first window row")
    add("--output-dir", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def methods(
    args: argparse.Namespace,
    params: LookaheadParams,
    model: TreeModel,
    bigrams: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, Callable[[list[int], int], Method]]:
    """By name: (prompt, its number) to a fresh method."""
    sizes = (params.window_size, params.ngram_size, params.verification_set_size)
    return {
        "plain": lambda prompt, _: Plain(prompt),
        "paper": lambda prompt, i: PaperLookahead(prompt, *sizes, False, args.seed + i),
        "paper+prompt": lambda prompt, i: PaperLookahead(
            prompt, *sizes, True, args.seed + i
        ),
        "ours": lambda prompt, _: OurLookahead(
            prompt, params, model, bigrams, args.block_size, args.max_tokens
        ),
    }


def measure(
    args: argparse.Namespace, model: TreeModel, params: LookaheadParams, dataset: str
) -> dict[str, list[list[list[int]]]]:
    """Tokens of each step of each prompt, by method.

    Raises:
        AssertionError: a method's output is not plain decoding's.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    bigrams = ask(model, tokenizer("")["input_ids"])
    texts = prompt_sets.load(dataset, args.data_dir, args.num_prompts)
    results: dict[str, list[list[list[int]]]] = {}
    for i, text in enumerate(texts):
        prompt = tokenizer(text)["input_ids"]
        for name, make in methods(args, params, model, bigrams).items():
            steps = decode(model, prompt, make(prompt, i), args.max_tokens)
            results.setdefault(name, []).append(steps)
            plain = sum(results["plain"][i], [])
            assert sum(steps, []) == plain, f"{dataset}, prompt {i}: {name} parts ways"
    return results


def summarize(results: dict[str, list[list[list[int]]]]) -> dict[str, Any]:
    """Step compression of each method over all prompts, and the ratios."""
    rows: dict[str, Any] = {}
    for name, prompts in results.items():
        steps = sum(len(p) - 1 for p in prompts)
        tokens = sum(len(step) for p in prompts for step in p[1:])
        rows[name] = {"tokens": tokens, "steps": steps, "S": tokens / max(1, steps)}
    for name in ("paper", "paper+prompt"):
        rows["ours"][f"over {name}"] = rows["ours"]["S"] / rows[name]["S"]
    return rows


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    params = LookaheadParams(*map(int, args.sizes.split("/")))
    model = TreeModel(args.model)
    # "models/llama" is llama, and demo/model demo-model.
    path = Path(args.model).resolve()
    name = f"{path.parent.name}-{path.name}" if path.name == "model" else path.name
    header = "".join(f"{h:>14}" for h in ("paper", "paper+prompt", "ours"))
    print(f"{name}, W/N/G {args.sizes}, S = tokens / steps")
    print(f"{'':14}{'tokens':>8}{header}{'over paper':>12}{'over +prompt':>14}")
    for dataset in args.datasets.split(","):
        start = time.perf_counter()
        results = measure(args, model, params, dataset)
        rows = summarize(results)
        ours = rows["ours"]
        values = "".join(f"{rows[m]['S']:14.3f}" for m in results if m != "plain")
        print(
            f"{Path(dataset).stem:14}{ours['tokens']:8d}{values}"
            f"{ours['over paper']:12.3f}{ours['over paper+prompt']:14.3f}",
            flush=True,
        )
        numbers = ("num_prompts", "max_tokens", "sizes", "block_size", "seed")
        settings = {key: getattr(args, key) for key in numbers}
        raw = {
            "settings": {"model": name, "dataset": Path(dataset).stem, **settings},
            "seconds": time.perf_counter() - start,
            "summary": rows,
            "steps": results,
        }
        args.output_dir.mkdir(parents=True, exist_ok=True)
        file = args.output_dir / f"step_compression-{name}-{Path(dataset).stem}.json"
        file.write_text(json.dumps(raw) + "\n")


if __name__ == "__main__":
    main()
