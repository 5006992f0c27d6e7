# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of host work that lookahead adds to a step, in a real engine on a CPU.

    python benchmarks/host_work.py --model demo/model --output host_work.json

Host work is all that the model runner does but the forward pass and the logits:
input preparation, drafting, sampling, bookkeeping. A plain engine serves the requests
first, then one with lookahead serves them with it and switched off, in turn; what
"on" takes more than plain is lookahead's. The scheduler's work, in a process of its
own, is not in these. Contexts beyond those the model was trained for are of no matter
here: its text is not read.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from offline import environment  # type: ignore[import-not-found]

BATCH_SIZES = [1, 16]
CONTEXTS = [200, 2000, 8000]


class WorkerExtension:
    """Times the steps of a worker that only decode."""

    model_runner: Any

    def time_steps(self) -> None:
        runner = self.model_runner
        most_decoded = runner.params.ngram_size if hasattr(runner, "params") else 1
        self.in_model = self.in_step = 0.0
        self.host_work: list[float] = []
        self.add_to("in_model", runner, "_model_forward")
        self.add_to("in_model", runner.model, "compute_logits")
        self.add_to("in_step", runner, "execute_model")
        self.add_to("in_step", runner, "sample_tokens")
        execute_model, sample_tokens = runner.execute_model, runner.sample_tokens

        def start_step(scheduler_output: Any, *args: Any) -> Any:
            self.in_model = self.in_step = 0.0
            most = max(scheduler_output.num_scheduled_tokens.values(), default=0)
            self.only_decodes = 0 < most <= most_decoded
            return execute_model(scheduler_output, *args)

        def end_step(*args: Any) -> Any:
            result = sample_tokens(*args)
            if self.only_decodes:
                self.host_work.append(self.in_step - self.in_model)
            return result

        runner.execute_model, runner.sample_tokens = start_step, end_step

    def add_to(self, clock: str, owner: Any, name: str) -> None:
        """Let a clock run while a method does."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds = time.perf_counter() - start
            setattr(self, clock, getattr(self, clock) + seconds)
            return result

        setattr(owner, name, timed)

    def take_host_work(self) -> list[float]:
        taken, self.host_work = self.host_work, []
        return taken


def measure(
    llm: Any, batch_size: int, context: int, modes: list[str], args: Any
) -> dict[str, float]:
    """Median milliseconds per step in each mode: plain, or lookahead off and on."""
    from vllm import SamplingParams

    text = llm.get_tokenizer().encode(Path(__file__).read_text())
    prompts = [
        {"prompt_token_ids": [text[(7 * i + j) % len(text)] for j in range(context)]}
        for i in range(batch_size)
    ]
    steps: dict[str, list[float]] = {name: [] for name in modes}
    extra: dict[str, Any] = {"off": {"lookahead": 0}, "on": {"lookahead": 1}}
    for turn in range(1 + args.repeats):
        for name in steps:
            # Without seeds: plain vLLM fails when a prompt of a seeded request is read
            # in parts, for it cannot wind a CPU's generator back.
            sampling = [
                SamplingParams(
                    temperature=args.temperature,
                    max_tokens=args.max_tokens,
                    ignore_eos=True,
                    extra_args=extra.get(name),
                )
                for _ in range(batch_size)
            ]
            llm.generate(prompts, sampling, use_tqdm=False)
            taken = llm.collective_rpc("take_host_work")[0]
            # The first turn fills caches; a batch that drains is a smaller one.
            steps[name] += taken[: len(taken) * 3 // 4] if turn else []
    return {name: 1000 * statistics.median(times) for name, times in steps.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="demo/model")
    add("--temperature", type=float, default=0.8)
    add("--max-tokens", type=int, default=100)
    add("--repeats", type=int, default=3)
    add("--output", type=Path, help="raw JSON")
    return parser.parse_args()


def engine(args: Any, speculative_config: dict[str, str] | None) -> Any:
    from vllm import LLM

    longest = max(CONTEXTS) + args.max_tokens
    llm = LLM(
        args.model,
        speculative_config=speculative_config,
        worker_extension_cls="host_work.WorkerExtension",
        hf_overrides={"max_position_embeddings": longest},
        max_model_len=longest,
        max_num_seqs=max(BATCH_SIZES),
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=True,
    )
    llm.collective_rpc("time_steps")
    return llm


def main() -> None:
    args = parse()
    cells: list[dict[str, Any]] = [
        {"batch": batch_size, "context": context}
        for batch_size in BATCH_SIZES
        for context in CONTEXTS
    ]
    llm = engine(args, None)
    for cell in cells:
        cell |= measure(llm, cell["batch"], cell["context"], ["plain"], args)
    # An idle worker spins: it must be gone before others are timed.
    llm.llm_engine.engine_core.shutdown()
    llm = engine(args, {"method": "lookahead"})
    print(f"{'batch':>5} {'context':>8} {'plain, ms':>10} {'off, ms':>8} {'on, ms':>8} "
          f"{'added, ms':>10}")  # fmt: skip
    for cell in cells:
        cell |= measure(llm, cell["batch"], cell["context"], ["off", "on"], args)
        cell["added"] = cell["on"] - cell["plain"]
        print(
            f"{cell['batch']:5} {cell['context']:8} {cell['plain']:10.3f} "
            f"{cell['off']:8.3f} {cell['on']:8.3f} {cell['added']:10.3f}",
            flush=True,
        )
    if args.output:
        raw = {"about": environment(), "milliseconds": cells}
        args.output.write_text(json.dumps(raw, indent=1) + "\n")


if __name__ == "__main__":
    main()
