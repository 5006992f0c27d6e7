# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU, in the order of its worth: a process per stage."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu.host import IEEE, Environment
from benchmarks.gpu.names import LOOKAHEAD, PLAIN, SIZES

MODEL_BYTES = 14e9  # of the widened model
ENGINE = {"--dtype": "bfloat16", "--max-model-len": "1024"}
# A request of 1024 tokens has 0.5 GiB of K/V in a 7B model. Of the correctness stages
# 8 run at once, in one engine; of the speed stages one, in each of up to four engines
# that share 80 GB; of the step stages one of 8k tokens, one engine after the other.
KV_BYTES = {"correctness": 6 << 30, "speed": 1 << 30, "step": 6 << 30}
GPU_SHARE = 0.24  # free when an engine starts
# Seconds that an engine may take to start; to end it then may take 20 more.
START_LIMIT = {"correctness": 150, "speed": 180, "step": 180}
# Outputs of that many tokens, of whose trigrams this share is distinct, do not loop.
DISTINCT_TOKENS, DISTINCT = 64, ["--min-distinct", "0.6", "--keep", "16"]
# Trees of 8, 16, 32, 64 and 120 nodes. A window is fed whole; of candidates there may
# be fewer than asked for.
TREES = ["2/5/0", "4/5/0", "8/5/0", "15/5/1", SIZES]
OWN_TREES = ["2/5/0", "4/5/0", "8/5/0", "16/5/0"]
REQUEST_SIZES = ["0/5/4", "0/5/15", "5/4/5", "5/5/5", "10/5/10", SIZES]
OUT = "{out}"  # in a stage's command, the file that it writes
TWO_STARTS = 120  # seconds that two engines take to start, at least

QUESTIONS = {
    "kernels": "Does each kernel agree with its reference on the hardware?",
    "starts": "Does plain vLLM start, does lookahead?",
    "float32": "Are float32 tokens plain vLLM's, greedy and seeded?",
    "bfloat16": "Do more bfloat16 tokens differ from plain vLLM's than plain's own do?",
    "step": "What does a tree step cost beside a plain step?",
    "speed": "How many tokens/s beside plain vLLM?",
    "times": "What do the kernels of a step cost, and attention beside others'?",
    "others": "How many tokens/s beside ngram_gpu, ngram and suffix?",
    "best": "Which sizes and which tiles are best?",
}


@dataclass(frozen=True)
class Stage:
    """A process that measures.

    Attributes:
        limit: seconds, generous.
        needs: what else must exist for the stage to be done.
        question: that it answers.
        environment: what its processes need set.
        least: seconds under which it is not worth starting.
        uses: what must exist for it to start; the stage "model" makes it.
    """

    name: str
    limit: int
    command: list[str]
    needs: Path | None = None
    question: str = ""
    environment: Environment = field(default_factory=dict)
    least: int = 30
    uses: Path | None = None


def module(name: str, *options: str, out: str = "--out") -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *options, out, OUT]


def all_stages(args: argparse.Namespace) -> list[Stage]:
    """The most valuable first, as far as one may come before what it needs."""
    model = args.model or args.model_dir or default_model_dir()
    made = model / "config.json"  # written last
    data = ["--dataset", args.dataset]
    if args.data_dir:
        data += ["--data-dir", args.data_dir]

    def engine(path: Path, kind: str) -> list[str]:
        options = [x for pair in ENGINE.items() for x in pair]
        options += ["--kv-cache-memory-bytes", str(KV_BYTES[kind])]
        options += ["--start-limit", str(START_LIMIT[kind])]
        return ["--model", str(path), *options, *data]

    def started(path: Path, *options: str) -> list[str]:
        options = (*engine(path, "correctness"), *options)
        return module("engine_start", *options, "--resume")

    def correctness(path: Path, *options: str) -> list[str]:
        options = (*engine(path, "correctness"), *options)
        options = ("--max-tokens", str(args.max_tokens), *options, "--resume")
        return module("engine_correctness", *options, out="--output")

    def steps(*options: str) -> list[str]:
        options = (*engine(model, "step"), *options, "--resume")
        return module("step_cost", *options)

    def speed(
        program: Sequence[str],
        methods: str,
        temperature: float,
        tokens: int = args.max_tokens,
    ) -> list[str]:
        command = [sys.executable, *program, *engine(model, "speed")]
        command += ["--methods", methods, "--temperature", str(temperature)]
        command += ["--max-tokens", str(tokens)]
        command += ["--gpu-memory-utilization", str(GPU_SHARE)]
        return [*command, "--output", OUT]

    fast = ["tree", "merged", "flash_causal", "unified_qq_bias", "xformers"]
    trees = ["--trees", "120", "64", "32", "16"]
    widest = ["--trees", "120", "--only", "attention"]
    times = module("kernels", *trees, "--contenders", *fast, "--resume")
    flex = module("kernels", *widest, "--contenders", "flash_causal", "flex")
    tiles = ["--only", "sweep", "--trees", "120", "32"]
    tiles += ["--contexts", "1024", "8192", "--heads", "32/32"]
    long = ["--contexts", "1024", "8192", "--max-model-len", "8448"]
    long += ["--num-prompts", "2"]
    offline, both = ["benchmarks/offline.py"], f"{PLAIN},{LOOKAHEAD}"
    distinct = ["-m", "benchmarks.gpu.engine_distinct", *DISTINCT]
    baselines = f"{PLAIN},ngram_gpu,ngram,suffix"
    source = args.source
    in_float32 = correctness(source, "--dtype", "float32")
    in_bfloat16 = correctness(args.model or source)
    trees_cost = steps("--servers", PLAIN, SIZES, "--trees", *TREES, *long)
    own_cost = steps("--servers", *OWN_TREES, *long)
    sizes = steps("--servers", PLAIN, SIZES, "--trees", *REQUEST_SIZES)

    def stage(
        topic: str, name: str, limit: int, command: list[str], **options
    ) -> Stage:
        uses = None if args.model or str(model) not in command else made
        question = QUESTIONS[topic]
        return Stage(name, limit, command, question=question, uses=uses, **options)

    stages = [
        stage("kernels", "kernel-tests", 240, module("kernel_tests", "--resume")),
        stage("starts", "engine-start", 360, started(source), least=60),
        stage("float32", "engine-float32", 300, in_float32, environment=IEEE, least=60),
        stage("bfloat16", "engine-correctness", 300, in_bfloat16, least=60),
    ]
    if args.model is None:
        command = [sys.executable, "benchmarks/widen_model.py"]
        command += ["--source", str(source), "--output", str(model)]
        stages.append(Stage("model", 300, command, made, QUESTIONS["step"], least=60))
    return [
        *stages,
        stage("step", "step-cost", 400, trees_cost, least=TWO_STARTS),
        stage("speed", "engine-speed", 420, speed(offline, both, 0), least=TWO_STARTS),
        stage("times", "kernel-times", 400, times),
        stage(
            "speed",
            "engine-distinct",
            420,
            speed(distinct, both, 0, DISTINCT_TOKENS),
            least=TWO_STARTS,
        ),
        stage(
            "others",
            "engine-baselines",
            500,
            speed(offline, baselines, 0),
            least=2 * TWO_STARTS,
        ),
        stage(
            "speed", "engine-sampled", 420, speed(offline, both, 0.8), least=TWO_STARTS
        ),
        stage("best", "engine-sizes", 400, sizes, least=TWO_STARTS),
        stage("step", "step-cost-own", 480, own_cost, least=TWO_STARTS),
        stage("times", "kernel-flex", 300, flex),
        stage("best", "kernel-tiles", 300, module("kernels", *tiles)),
    ]


def default_model_dir() -> Path:
    """In memory, if there is room: a disk may take longer than the measurements."""
    name, memory = "lookahead-7b-cost", Path("/dev/shm")
    fits = memory.exists() and shutil.disk_usage(memory).free > 1.5 * MODEL_BYTES
    if fits or (memory / name).exists():
        return memory / name
    return Path(tempfile.gettempdir()) / name


# Options that come after a stage's own and so take their place: what Triton's
# interpreter does in a minute or so.
TOY_ENGINE = ["--dtype", "float32", "--max-model-len", "320", "--eager"]
TOY_ENGINE += ["--kv-cache-memory-bytes", str(64 << 20), "--num-prompts", "1"]
TOY_TEXT = [*TOY_ENGINE, "--max-tokens", "4"]
TOY_CORRECT = [*TOY_TEXT, "--sizes", "3/3/3", "--batch-size", "2"]
TOY_SPEED = [*TOY_TEXT, "--repeats", "1", "--start-limit", "300"]
TOY_STEPS = [*TOY_TEXT, "--repeats", "1"]
TOY_KERNELS = ["--smoke"]
TOY_SHAPE = {"hidden-size": 128, "intermediate-size": 128, "num-hidden-layers": 2}
TOY_SHAPE |= {"num-attention-heads": 4, "num-key-value-heads": 2}
TOY_SHAPE |= {"head-dim": 32, "vocab-size": 128}
TOY = {
    "kernel-tests": ["tests/kernels/test_verify.py"],
    "engine-start": TOY_TEXT,
    "engine-float32": TOY_CORRECT,
    "engine-correctness": [*TOY_CORRECT, "--dtype", "bfloat16"],
    "model": [f"--{name}={value}" for name, value in TOY_SHAPE.items()],
    "step-cost": [*TOY_STEPS, "--contexts", "20", "40"],
    "engine-speed": TOY_SPEED,
    "kernel-times": TOY_KERNELS,
    "engine-distinct": TOY_SPEED,
    "engine-baselines": TOY_SPEED,
    "engine-sampled": TOY_SPEED,
    "engine-sizes": [*TOY_STEPS, "--trees", "0/5/15", SIZES],
    "step-cost-own": [*TOY_STEPS, "--servers", "2/5/0", "--contexts", "20"],
    "kernel-flex": TOY_KERNELS,
    "kernel-tiles": TOY_KERNELS,
}


def toy(stage: Stage) -> Stage:
    """The same on shapes small enough for Triton's interpreter."""
    return replace(stage, command=[*stage.command, *TOY[stage.name]], least=30)
