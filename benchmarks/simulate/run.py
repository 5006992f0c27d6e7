# SPDX-License-Identifier: Apache-2.0
"""Serve recorded requests with a strategy, one at a time."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.prompts as prompt_sets
from benchmarks.simulate import sessions
from benchmarks.simulate.bigrams import load_bigrams
from benchmarks.simulate.protocol import Answers, Bigrams, Request, Strategy, Tree
from benchmarks.simulate.record import Model, Oracle, load_records

# What tokens follow when they are asked for their bigrams: anything that takes the
# attention which a text's first token draws.
BEFORE = ","
CACHE = Path(".models") / "records"


@dataclass
class Served:
    """One request.

    Attributes:
        tokens: of each step.
        nodes: fed in each step.
        chances: (log-chance, accepted) of each candidate, of a strategy that says it.
    """

    tokens: list[list[int]]
    nodes: list[int]
    chances: list[tuple[float, bool]]


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """What every simulation is told: a model, and which requests.

    Args:
        doc: of the module; its first line says what it does.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="any model that transformers loads")
    add("--datasets", default="humaneval,gsm8k,mt-bench")
    add("--data-dir", help="folder of humaneval/, gsm8k/ and mt_bench/")
    add("--temperatures", default="0,0.8")
    add("--max-tokens", type=int, default=64)
    return parser


Watch = Callable[[Strategy, Tree, Answers, list[int]], None]


def check(tree: Tree, budget: int) -> None:
    """Raises AssertionError: the tree is too large or no tree."""
    size = len(tree.tokens)
    assert 1 <= size == len(tree.parents) <= budget, f"{size} nodes, {budget} at most"
    assert all(0 <= p < i for i, p in enumerate(tree.parents[1:], 1))
    if tree.num_verified is None:
        named = set(zip(tree.parents, tree.tokens, strict=True))
        assert len(named) == size, "siblings are equal"


def serve(
    oracle: Oracle,
    make: Callable[[Request], Strategy],
    budget: int,
    max_tokens: int,
    bigrams: tuple[Bigrams, Bigrams],
    watch: Watch | None = None,
) -> Served:
    """Decode until an EOS id or `max_tokens`.

    Raises:
        AssertionError: a tree is malformed, or the output is not plain's.
    """
    record, eos_ids = oracle.record, oracle.model.eos_ids
    length = len(record.prompt)
    request = Request(
        record.prompt,
        record.output[0],
        Answers(
            [*record.prompt[1:], record.output[0]],
            record.ids[:length],
            record.logprobs[:length],
        ),
        record.temperature,
        oracle.noise,
        record.seeds,
        *bigrams,
        max_tokens,
        lambda position, tree: oracle.answer(position, tree, True),
    )
    strategy = make(request)
    output, out = [request.first], Served([], [], [])
    while len(output) < max_tokens and output[-1] not in eos_ids:
        tree = strategy.draft(budget)
        check(tree, budget)
        position = length + len(output) - 1
        answers = oracle.answer(position, tree, strategy.reads_all_nodes)
        path = tree.walk(answers.sampled)
        for node, log_chance in enumerate(getattr(strategy, "chances", [])):
            if node:
                out.chances.append((log_chance, node in path))
        if watch:
            watch(strategy, tree, answers, path)
        strategy.accept(answers, path)
        emitted = [answers.sampled[node] for node in path][: max_tokens - len(output)]
        ends = [i for i, token in enumerate(emitted) if token in eos_ids]
        emitted = emitted[: ends[0] + 1] if ends else emitted
        output += emitted
        out.tokens.append(emitted)
        out.nodes.append(len(tree.tokens))
    plain = record.output[: len(output)]
    assert output == plain and (len(output) == max_tokens or output[-1] in eos_ids), (
        "the output is not plain's"
    )
    return out


def oracles(
    model: Model,
    path: str,
    dataset: str,
    data_dir: str,
    temperature: float,
    num_prompts: int,
    max_tokens: int,
) -> tuple[list[Oracle], tuple[Bigrams, Bigrams]]:
    """Recorded requests of a data set through the chat template, and bigrams."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if dataset in sessions.SETS:
        texts = sessions.load(dataset, data_dir, num_prompts)
    else:
        texts = prompt_sets.load(dataset, data_dir, num_prompts)
    prompts = prompt_sets.as_chats(texts, path)
    name = Path(path).name
    file = CACHE / f"{name}-{dataset}-{temperature:g}-{max_tokens}.pt"
    records = load_records(model, prompts, max_tokens, temperature, file)
    alone, after = (
        load_bigrams(model, records, prefix, CACHE / f"{name}-bigrams-{kind}.npz")
        for kind, prefix in (
            ("alone", tokenizer("")["input_ids"]),
            ("after", tokenizer(BEFORE)["input_ids"]),
        )
    )
    return [Oracle(model, record) for record in records], (alone, after)
