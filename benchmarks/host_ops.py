# SPDX-License-Identifier: Apache-2.0
"""Microseconds that a step's host work takes on a CPU, op by op.

Run `python -m benchmarks.host_ops --out host_ops.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import CANDIDATE
from vllm_lookahead.numba_kernels.answers import likeliest_tokens
from vllm_lookahead.numba_kernels.ops import NumbaOps, warm_up
from vllm_lookahead.params import LookaheadParams

SIZES = [(0, 8, 8), (5, 4, 5), (15, 5, 15)]
CONTEXTS = [200, 2000, 8000, 32000]
BLOCK_SIZE = 128  # vLLM's on a CPU
VOCAB = 5000


def text(length: int, vocab: int = VOCAB) -> torch.Tensor:
    """Tokens as frequent as words are: the n-th most common, one in n."""
    weight = 1 / torch.arange(1.0, vocab + 1)
    return torch.multinomial(weight, length, replacement=True).int()


def make_state(
    params: LookaheadParams, batch_size: int, context: int
) -> tuple[BlockPages, RequestBatch]:
    """Requests in the middle of a generation, the last half of the text harvested."""
    num_blocks = (context + params.max_tree_size) // BLOCK_SIZE + 1
    pages = BlockPages.allocate(batch_size * num_blocks, BLOCK_SIZE, params)
    pages.tokens[:] = text(pages.tokens.numel()).view_as(pages.tokens)
    table = torch.randperm(batch_size * num_blocks).view(batch_size, num_blocks)
    pages.answers[:] = text(pages.answers.numel()).view_as(pages.answers)
    pages.answer_count[:] = pages.answers.shape[1]
    if params.window_size:
        harvested = table[:, num_blocks // 2 :]
        ring = pages.ring[harvested]
        pages.ring[harvested] = text(ring.numel()).view_as(ring)
        pages.ring_count[harvested] = ring.shape[-2]
        pages.window[:] = text(pages.window.numel()).view_as(pages.window)

    def column(value: int) -> torch.Tensor:
        return torch.full((batch_size,), value, dtype=torch.int32)

    batch = RequestBatch(
        block_table=table.int(),
        position=column(context),
        root=text(batch_size),
        window_size=column(params.window_size),
        ngram_size=column(params.ngram_size),
        verification_set_size=column(params.verification_set_size),
        max_nodes=column(params.max_tree_size),
    )
    return pages, batch


def step_calls(
    params: LookaheadParams, batch_size: int, context: int
) -> dict[str, Callable[[], object]]:
    """Each op of a step as a call that can be repeated."""
    ops = NumbaOps()
    pages, batch = make_state(params, batch_size, context)
    n = params.ngram_size
    slots = batch.root_slots(BLOCK_SIZE) | 1
    hints = Hints(
        bigrams=torch.randint(0, VOCAB, (VOCAB, NUM_SUCCESSORS)).int(),
        bigram_logprobs=torch.randn(VOCAB, NUM_SUCCESSORS).log_softmax(-1),
        temperature=torch.zeros(batch_size),
        seeds=torch.zeros(batch_size, n - 1, dtype=torch.int64),
        noise=cpu_noise,
    )
    most = params.verification_set_size
    tree, _ = ops.draft(pages, batch, hints, most)
    sampled = torch.zeros_like(tree.tokens)
    for node in range(tree.tokens.shape[1] - 1, 0, -1):  # the likeliest path is right
        drafted = tree.kinds[:, node] == CANDIDATE
        parent = tree.parents[drafted, node].long()
        sampled[drafted, parent] = tree.tokens[drafted, node]
    verdict = ops.verify(tree, sampled, n)
    rows = torch.arange(batch_size, dtype=torch.int32) * tree.tokens.shape[1]
    logits = torch.randn(tree.tokens.numel(), VOCAB)
    answers = Answers(*likeliest_tokens(logits), rows)
    return {
        "write_tokens": lambda: ops.write_tokens(pages, slots, batch.root),
        "draft": lambda: ops.draft(pages, batch, hints, most),
        "mask": lambda: ops.ancestors(tree),
        "verify": lambda: ops.verify(tree, sampled, n),
        "compact": lambda: ops.compact([], batch, verdict, BLOCK_SIZE),
        "update": lambda: ops.update(pages, batch, tree, sampled, verdict),
        "likeliest": lambda: likeliest_tokens(logits),
        "answers": lambda: ops.keep_answers(pages, batch, tree, verdict, answers),
    }


def microseconds(
    calls: dict[str, Callable[[], object]], seconds: float, evict: bool
) -> dict[str, float]:
    """The fastest of many steps, or the median of steps after an eviction."""
    other_data = torch.zeros(2**24) if evict else None
    times: dict[str, list[int]] = {op: [] for op in calls}
    end, steps = time.perf_counter() + seconds, 0
    while steps < 20 or time.perf_counter() < end:
        if other_data is not None:
            other_data += 1
        for op, call in calls.items():
            start = time.perf_counter_ns()
            call()
            times[op].append(time.perf_counter_ns() - start)
        steps += 1
    pick = statistics.median if evict else min
    return {op: pick(samples) / 1000 for op, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--seconds", type=float, default=0.5, help="per line")
    parser.add_argument(
        "--evict",
        action="store_true",
        help="push everything out of the caches before each step, as a model does",
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    results: list[dict] = []
    print("microseconds per call\n   W  N  G batch context ", end="")
    for w, n, g in SIZES:
        params = LookaheadParams(w, n, g)
        warm_up(params, BLOCK_SIZE)
        for batch_size in args.batch_sizes:
            for context in args.contexts:
                torch.manual_seed(0)
                calls = step_calls(params, batch_size, context)
                if not results:
                    print(*(f"{op:>13}" for op in calls), "        total")
                times = microseconds(calls, args.seconds, args.evict)
                print(f"{w:4}{n:3}{g:3}{batch_size:6}{context:8} ", end="")
                print(*(f"{t:13.1f}" for t in times.values()), end="")
                print(f"{sum(times.values()):14.1f}", flush=True)
                sizes = {"W": w, "N": n, "G": g}
                state = {"batch": batch_size, "context": context}
                results.append({**sizes, **state, "us": times})
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
