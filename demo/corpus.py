# SPDX-License-Identifier: Apache-2.0
"""What the demo model is trained on: Python source that is on the machine already."""

import hashlib
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Licence -> packages by import name and weight: the visits of a file in a pass, or
# below 1 the share of the files that is used.
LICENCES = {
    "BSD-3-Clause": """
        torch:0.25 torchgen:0.3 numpy:0.5 sympy:0.12 networkx:0.7 mpmath:0.5
        fsspec:1.5 jinja2:1.5 starlette:1.5 uvicorn:1.5 click:1.5 httpx:1.5
        httpcore:1.0 psutil:1.0 websockets:1.0
    """,
    "Apache-2.0": """
        transformers:0.5 vllm:0.25 prometheus_client:1.0 sortedcontainers:1.5
        requests:1.5 aiohttp:1.5 huggingface_hub:1.0 openai:0.05 ray:0.3
    """,
    "MIT": """
        _pytest:1.0 attr:1.0 cachetools:1.5 h11:1.0 jsonschema:1.0 mypy:0.6
        urllib3:1.5 setuptools:1.0 pip:1.5 rich:1.0 typer:1.0 fastapi:1.0 pydantic:1.0
        anyio:1.0 lark:1.0
    """,
    "BSD-2-Clause": "pygments:0.2 numba:0.2",
}
PACKAGES = {
    name: (licence, float(weight))
    for licence, packages in LICENCES.items()
    for name, weight in (item.split(":") for item in packages.split())
}
STDLIB_WEIGHT, TEST_WEIGHT = 3.0, 0.15
# Vendored copies, generated tables, and files that duplicate the standard library.
SKIP = re.compile(
    r"site-packages|dist-packages|__pycache__|/_vendor/|/_distutils/|/encodings/(?!__|"
    r"aliases|idna|utf_8|punycode)|pydoc_data|lib2to3/tests/data|/bad_?\w*\.py|unicode|"
    r"_pb2\.py|_cpuinfo|/_generated|autogen|/lextab|/yacctab|dummy_\w+objects"
)
TESTS = re.compile(r"/(tests?|idle_test|testing|_testing)/|/test_\w+\.py")
BENCHMARKS = re.compile(r"human_?eval|gsm_?8k|\bmbpp\b", re.IGNORECASE)
# Indents and newlines are tokens of their own; a word takes one character before it.
SPLIT = r"\n+| {2,}|[^\s\p{L}\p{N}]?\p{L}+| \p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"


@dataclass
class Document:
    source: str
    text: str
    weight: float
    held_out: bool = False


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32


def gather() -> list[Document]:
    """Read the corpus; exact and near duplicates of held-out files are left out."""
    paths = sysconfig.get_paths()
    roots = [("stdlib", Path(paths["stdlib"]), STDLIB_WEIGHT)]
    for name, (_, weight) in PACKAGES.items():
        folders = {Path(paths[k]) / name for k in ("purelib", "platlib")}
        roots += [(name, f, weight) for f in sorted(folders) if f.is_dir()]
    documents, seen = [], set()
    for source, root, weight in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            name = f"{source}/{relative}"
            if SKIP.search("/" + name.replace(source + "/", "/", 1)):
                continue
            is_test = bool(TESTS.search("/" + relative))
            visits = weight * (TEST_WEIGHT / STDLIB_WEIGHT if is_test else 1.0)
            held_out = source == "stdlib" and not is_test and share(relative) < 0.02
            if not held_out and share("use " + name) >= visits:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if source != "stdlib":  # licence headers
                text = re.sub(r"\A(?:#[^\n]*\n|\s*\n)+", "", text)
            digest = hashlib.sha256(text.encode()).digest()
            digits = len(re.findall(r"\d", text)) / max(len(text), 1)
            longest = max(map(len, text.split("\n")))
            if digest in seen or not 200 < len(text) < 250_000:
                continue
            if digits > 0.15 or longest > 500 or BENCHMARKS.search(text):
                continue
            seen.add(digest)
            if name.startswith("transformers/models/") and share(name) > 0.1:
                continue  # near-duplicates of each other
            documents.append(Document(source, text, max(1.0, visits), held_out))

    def lines(text: str) -> set[str]:
        return {s for s in map(str.strip, text.split("\n")) if len(s) > 25}

    unseen = set().union(*(lines(d.text) for d in documents if d.held_out))

    def clean(d: Document) -> bool:
        own = lines(d.text)
        return d.held_out or len(own & unseen) <= 0.2 * len(own)

    return [d for d in documents if clean(d)]


def train_tokenizer(documents: list[Document], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    sample = [d.text for d in documents if not d.held_out and rng.random() < 0.25]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def corpus_table(documents: list[Document]) -> str:
    rows = []
    for source in dict.fromkeys(d.source for d in documents):
        licence, weight = PACKAGES.get(source, ("PSF-2.0", STDLIB_WEIGHT))
        own = [d for d in documents if d.source == source and not d.held_out]
        size = sum(len(d.text.encode()) for d in own)
        rows.append(f"| {source} | {licence} | {len(own)} | {size:,} | {weight} |")
    return "\n".join(rows)
