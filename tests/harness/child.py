# SPDX-License-Identifier: Apache-2.0
"""A process that runs engines, one at a time, on request.

Each line of stdin is a job: {"model", "lookahead", "engine", "batches", "watch"}; each
line written to the pipe of file descriptor `sys.argv[1]` is its result. An engine
serves every job that asks for the same one in a row.
"""

import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from architectures import make_architecture
from interpreter import patch_language_once, stand_in
from models import make_model
from poison import poisoned

ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "block_size": 32,
    "kv_cache_memory_bytes": 4 << 20,
    "enforce_eager": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "disable_log_stats": False,
}
WATCHED = ("waits", "allocated", "launched", "most_launched", "operated", "steps")
WATCHED += ("trees", "branched", "merged", "differing", "read")
INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
numbers = itertools.count()


class Engines:
    def __init__(self, models: Path) -> None:
        self.models = models
        self.key: str | None = None
        self.llm: Any = None
        self.chunks: Chunks
        self.watch: Any = None

    def get(self, job: dict[str, Any]) -> Any:
        from vllm import LLM

        wanted = {k: job.get(k) for k in ("model", "lookahead", "engine", "watch")}
        key = json.dumps(wanted)
        if key != self.key:
            self.key, self.llm, self.watch = None, None, None
            model = self.models / "-".join(map(str, job["model"]))
            if not model.exists():
                by_name = isinstance(job["model"][0], str)
                make = make_architecture if by_name else make_model
                make(model, *job["model"])
            engine = ENGINE | job["engine"]
            self.dense: list[bool] = []
            warm_up = engine.pop("warm_up", False)
            chunks = logits_in_chunks(engine.pop("chunk_rows", None))
            default = default_sizes(engine.pop("default_sizes", None))
            step_times = engine.pop("step_times", None)
            wanted = job["lookahead"] and engine.get("async_scheduling")
            ahead = scheduled_ahead() if wanted else nullcontext()
            with chunks, default, request_states(self.dense), ahead:
                self.llm = LLM(
                    str(model), speculative_config=job["lookahead"], **engine
                )
            # vLLM's own attention multiplies what it masks.
            if INTERPRETED and job["lookahead"] and model_runner(self.llm).slot_views:
                for cache in model_runner(self.llm).kv_caches:
                    cache.fill_(float("nan"))  # slots that no token was written to
            if warm_up:
                warm_up_kernels(self.llm)
            if step_times and job["lookahead"]:
                scheduler(self.llm).forest.learn_times(step_times, 0)
            self.chunks = Chunks(scheduler(self.llm))
            if job.get("watch") == "trees":
                from watch_trees import WatchedTrees

                self.watch = WatchedTrees(model_runner(self.llm))
            elif job.get("watch") == "corpus":
                from watch_corpus import WatchedCorpus

                if job["lookahead"]:
                    self.watch = WatchedCorpus(model_runner(self.llm))
            elif job.get("watch") == "inputs":
                from watch_inputs import WatchedInputs

                self.watch = WatchedInputs(model_runner(self.llm))
            elif job.get("watch"):
                from watch import WatchedSteps

                self.watch = WatchedSteps(model_runner(self.llm))
            self.key = key
        return self.llm


class Chunks:
    """Counts the steps that read a part of a prompt, and those beside drafts.

    Attributes:
        cut: nodes that the scheduler gave to each step whose trees might have had more,
            and tokens that it scheduled beside them.
    """

    def __init__(self, scheduler: Any) -> None:
        self.steps = self.beside_drafts = 0
        self.cut: list[tuple[int, int]] = []
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            best = getattr(output, "best_nodes", None)
            if best is not None:
                most = output.max_nodes
                if best < sum(most.values()) - len(most):
                    others = output.num_scheduled_tokens.keys() - most
                    tokens = sum(output.num_scheduled_tokens[r] for r in others)
                    self.cut.append((best, tokens))
            running = [scheduler.requests[r] for r in output.num_scheduled_tokens]
            if any(r.num_computed_tokens < r.num_prompt_tokens for r in running):
                drafts = output.scheduled_spec_decode_tokens
                self.steps += 1
                # vLLM gives drafts to new requests, too, that nobody made.
                cached = output.scheduled_cached_reqs.req_ids
                self.beside_drafts += any(drafts.get(r) for r in cached)
            return output

        scheduler.schedule = counted


@contextmanager
def scheduled_ahead() -> Iterator[None]:
    """Have vLLM schedule ahead on a CPU, too, with the V2 runner as with V1."""
    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def checked(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    name, platform = "check_and_update_config", type(current_platform)
    with mock.patch.object(platform, name, staticmethod(checked)):
        yield


def logits_in_chunks(rows: int | None) -> AbstractContextManager:
    if rows is None:
        return nullcontext()
    name = "vllm_lookahead.engine.v2.sampling.get_max_chunk_logits"
    return mock.patch(name, lambda vocab_size: rows)


def default_sizes(sizes: list[int] | None) -> AbstractContextManager:
    """W, N, G and the budget that lookahead picks by itself."""
    if sizes is None:
        return nullcontext()
    from vllm_lookahead.params import LookaheadParams

    name = "vllm_lookahead.engine.config.default_params"
    return mock.patch(name, lambda device_type: LookaheadParams(*sizes))


def warm_up_kernels(llm: Any) -> None:
    """What vLLM's GPU worker does before it captures graphs, and no eager engine."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    worker = llm.llm_engine.model_executor.driver_worker.worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)


@contextmanager
def request_states(dense: list[bool]) -> Iterator[None]:
    """Note of each `RequestState` made if the device holds all tokens."""
    from vllm.v1.worker.gpu.states import RequestState

    init = RequestState.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        dense.append(kwargs.get("use_dense_all_token_ids", False))
        init(self, *args, **kwargs)

    with mock.patch.object(RequestState, "__init__", noted):
        yield


def run(engines: Engines, job: dict[str, Any]) -> dict[str, Any]:
    llm = engines.get(job)
    before, at_before, chunks = counters(llm), accepted_at(llm), engines.chunks
    chunks.steps = chunks.beside_drafts = 0
    chunks.cut.clear()
    start = time.perf_counter()
    outputs, samples, usage = [], [], []
    for batch in job["batches"]:
        for name, output, seen in generate(llm, batch):
            samples += [list(c.token_ids) for c in output.outputs]
            completion = output.outputs[0]
            logprobs = completion.logprobs
            outputs.append(
                {
                    "name": name,
                    "tokens": list(completion.token_ids),
                    "reason": completion.finish_reason,
                    "stop": completion.stop_reason,
                    "text": completion.text,
                    "cached": output.num_cached_tokens,
                    "logprobs": logprobs
                    and [
                        sorted((t, p.logprob) for t, p in position.items())
                        for position in logprobs
                    ],
                    "ngrams": seen,
                }
            )
        usage.append(scheduler(llm).kv_cache_manager.usage)
    after = counters(llm)
    return {
        "outputs": outputs,
        "samples": samples,
        "usage": usage,
        "seconds": time.perf_counter() - start,
        "metrics": {k: v - before.get(k, 0) for k, v in after.items()},
        "accepted_at": [
            a - b for a, b in zip(accepted_at(llm), at_before, strict=True)
        ],
        "scheduler": type(scheduler(llm)).__name__,
        "attention": attention(llm),
        "dense": engines.dense,
        "chunks": [chunks.steps, chunks.beside_drafts],
        "cut": chunks.cut,
        "watched": engines.watch
        and {
            k: v for k in WATCHED if (v := getattr(engines.watch, k, None)) is not None
        },
    }


def generate(
    llm: Any, batch: list[dict[str, Any]]
) -> list[tuple[str, Any, int | None]]:
    """Run requests side by side, step by step.

    Returns:
        Of each its name, its last output, and for a watched one the Jacobi n-grams
        that its blocks hold once its prompt has been read.
    """
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    requests = {f"r{next(numbers)}": request for request in batch}
    for name, request in requests.items():
        params = sampling_params(request)
        if not request.keys() & {"abort_after", "watch"}:
            params.output_kind = RequestOutputKind.FINAL_ONLY
        prompt = {"prompt_token_ids": request["prompt"]}
        if "embeds" in request:
            prompt = {"prompt_embeds": embeds(llm, **request["embeds"])}
        if "salt" in request:
            prompt["cache_salt"] = request["salt"]
        engine.add_request(name, prompt, params, lora_request=lora(request))
    last: dict[str, Any] = {}
    ngrams: dict[str, int] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            name = output.request_id
            request = requests[name]
            if request.get("watch") and name not in last:
                ngrams[name] = num_ngrams(llm, name, len(request["prompt"]))
            last[name] = output
            count = len(output.outputs[0].token_ids)
            if count >= request.get("abort_after", count + 1) and not output.finished:
                engine.abort_request([name])
    return [(name, last[name], ngrams.get(name)) for name in requests]


def sampling_params(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    options = dict(request["params"])
    kinds = ("regex", "json", "choice", "grammar")
    if grammar := {k: options.pop(k) for k in kinds if k in options}:
        options["structured_outputs"] = StructuredOutputsParams(**grammar)
    if bias := options.get("logit_bias"):  # JSON has no integer keys
        options["logit_bias"] = {int(token): b for token, b in bias.items()}
    return SamplingParams(**options)


def embeds(llm: Any, seed: int, length: int) -> Any:
    """A prompt that no tokens spell."""
    import torch

    size = llm.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, size, generator=generator)


def lora(request: dict[str, Any]) -> Any:
    """Its adapter; one folder is one adapter."""
    from vllm.lora.request import LoRARequest

    if "lora" not in request:
        return None
    number, path = request["lora"]
    return LoRARequest(f"adapter-{number}", number, path)


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def model_runner(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def attention(llm: Any) -> str:
    """The class that attends."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return type(next(x.impl for x in layers.values() if hasattr(x, "impl"))).__name__


def num_ngrams(llm: Any, name: str, position: int) -> int:
    """Jacobi n-grams in the pages of a running request's first `position` tokens."""
    runner = model_runner(llm)
    inputs, pages = runner.input_batch, runner.pages
    (row,) = (i for r, i in inputs.req_id_to_index.items() if r.startswith(f"{name}-"))
    num_blocks = -(-position // pages.block_size)
    blocks = inputs.block_table[0].block_table.np[row, :num_blocks]
    return int((pages.ring[blocks][..., 1] >= 0).sum())


def counters(llm: Any) -> dict[str, float]:
    from vllm.v1.metrics.reader import Counter

    metrics = llm.get_metrics()
    return {m.name: m.value for m in metrics if isinstance(m, Counter)}


def accepted_at(llm: Any) -> list[int]:
    """Drafts accepted at each position of a draft."""
    from vllm.v1.metrics.reader import Vector

    vectors = [m.values for m in llm.get_metrics() if isinstance(m, Vector)]
    return vectors[0] if vectors else []


def jobs() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def override_kernels_once() -> None:
    """vLLM rebinds its CPU kernels per engine, and trips over llvmlite's modules."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    once = functools.cache(platform.register_triton_kernel_overrides)
    platform.register_triton_kernel_overrides = staticmethod(once)


def main() -> None:
    stand_in()
    override_kernels_once()
    poison: AbstractContextManager = nullcontext()
    if INTERPRETED:
        patch_language_once()
        poison = poisoned()
    with os.fdopen(int(sys.argv[1]), "w") as results, poison:
        engines = Engines(Path(sys.argv[2]))
        for job in jobs():
            try:
                result = run(engines, job)
            except Exception as error:
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(result), file=results, flush=True)
        del engines
    os._exit(0)  # Python's own end takes seconds, and has nothing left to do


if __name__ == "__main__":
    main()
