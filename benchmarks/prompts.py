# SPDX-License-Identifier: Apache-2.0
"""Prompts of the data sets that the benchmarks know, and of any JSONL file."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Where each set lies below the data folder.
FILES = {
    "humaneval": "humaneval/HumanEval.jsonl.gz",
    "gsm8k": "gsm8k/test.jsonl",
    "mt-bench": "mt_bench/question.jsonl",
}
# Names under which a row of some JSONL file may hold its prompt.
PROMPT_KEYS = ("prompt", "question", "text", "instruction")
DATA_DIR = "LOOKAHEAD_DATA"


def load(dataset: str, data_dir: str | None, limit: int) -> list[str]:
    """The first `limit` prompts.

    Args:
        dataset: "humaneval", "gsm8k", "mt-bench", or the path of a JSONL file with
            a prompt, a question, a text or an instruction per row.
        data_dir: folder of the known sets; else $LOOKAHEAD_DATA.
        limit: most prompts.

    Raises:
        SystemExit: the file is missing or has no prompt in a row.
    """
    path = Path(dataset)
    if dataset in FILES:
        folder = data_dir or os.environ.get(DATA_DIR)
        if folder is None:
            raise SystemExit(
                f"--dataset {dataset}: its folder is not known; give --data-dir or "
                f"set {DATA_DIR} to one that holds {FILES[dataset]}"
            )
        path = Path(folder) / FILES[dataset]
    if not path.exists():
        raise SystemExit(f"--dataset {dataset}: there is no file {path}")
    prompts: list[str] = []
    for number, row in enumerate(rows(path), 1):
        if len(prompts) == limit:
            break
        prompts.append(_prompt(dataset, row, f"{path}:{number}"))
    return prompts


def as_chats(prompts: list[str], model: str) -> list[list[int]]:
    """Tokens of the prompts as a user's first turns, by the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    chats = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        chats.append(list(encoded["input_ids"]))
    return chats


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a JSONL file, which may be packed."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _prompt(dataset: str, row: dict[str, Any], where: str) -> str:
    if dataset == "gsm8k":
        return f"Question: {row['question']}\nAnswer:"
    if dataset == "mt-bench":
        return row["turns"][0]
    for key in PROMPT_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
    raise SystemExit(f"{where}: no prompt; give one of {', '.join(PROMPT_KEYS)}")
