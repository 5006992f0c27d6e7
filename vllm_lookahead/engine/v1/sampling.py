# SPDX-License-Identifier: Apache-2.0
"""Sample and match with vLLM's own V1 sampler.

Greedy batches take the argmax of every row at once. Any other batch is walked:
each level of the walk calls vLLM's sampler on one row per request, which is what
plain decoding would have called, with the same history, the same generator state
and the same logits processors. So the tokens are plain decoding's.
"""

from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v1.trees import StepTrees
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.numba_kernels.walk import Walk
from vllm_lookahead.params import LookaheadParams

# Seeds of noise are below this, in vLLM's sampler.
_SEEDS = 2**31


def sample_along_trees(
    runner: CPUModelRunner,
    ops: NumbaOps,
    sizes: LookaheadParams,
    step: StepTrees,
    logits: torch.Tensor,
) -> tuple[SamplerOutput, torch.Tensor, Verdict]:
    """Sample every request of the step, trees and others.

    Args:
        runner: vLLM's, for its sampler and the batch's sampling metadata.
        ops: to walk the trees with.
        sizes: the server's.
        step: the trees.
        logits: [rows, vocab_size] float32, laid out as `step.flat.logits_indices`.

    Returns:
        output: tokens as [num_requests, N], -1 beyond the emitted ones.
        sampled: [b, T] integers, the model's token after each node; meaningless at
            nodes without logits, and everywhere if it was sampled without a window.
        verdict: of the trees.
    """
    metadata = runner.input_batch.sampling_metadata
    if takes_argmax(metadata):
        best = runner.sampler.greedy_sample(logits).long()
        sampled = _by_node(best, step)
        verdict = ops.verify(step.tree, sampled, sizes.ngram_size)
        tokens = torch.full((step.num_requests, verdict.tokens.shape[1]), EMPTY)
        tokens[:, 0] = best[step.flat.logits_start[1:] - 1]
        tokens[step.requests] = verdict.tokens.long()
        return SamplerOutput(tokens.int(), None), sampled, verdict

    walk = Walk(step.tree, step.requests, step.flat, sizes.ngram_size)
    logprobs = _draw_along(walk, runner, step, logits, metadata)
    # Read by the window alone, which is refilled with the model's likeliest tokens.
    sampled = step.tree.tokens
    if sizes.window_size:
        sampled = _by_node(logits.argmax(-1), step)
    tokens = torch.from_numpy(walk.tokens[:, : walk.level])
    return SamplerOutput(tokens, logprobs), sampled, walk.verdict()


def upcoming_noise(
    runner: CPUModelRunner, requests: np.ndarray, depths: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `TopKTopPSampler.forward_cpu` will key its noise by, if nothing intervenes.

    A request with a seed draws from its own generator. Others share one with the
    whole batch: which of its numbers is theirs holds for a batch whose requests all
    walk equally far, and is a guess otherwise.

    Args:
        runner: vLLM's, between two steps.
        requests: [b] int64, where they are in the batch.
        depths: how many tokens ahead, N-1.

    Returns:
        temperature: [b] float32; 0 where there is no noise, or none that can be known.
        seeds: [b, N-1] int64.
    """
    metadata = runner.input_batch.sampling_metadata
    sampler = runner.sampler.topk_topp_sampler
    num_requests = runner.input_batch.num_reqs
    seeds = torch.zeros(len(requests), depths, dtype=torch.int64)
    if (
        metadata.all_greedy
        or sampler.forward.__name__ != "forward_cpu"
        or getattr(sampler, "use_fp64_gumbel", True)  # by that name in vLLM 0.32
    ):
        return torch.zeros(len(requests)), seeds
    generators = metadata.generators
    if len(generators) < num_requests:
        shared = torch.default_generator.clone_state()
        of_all = torch.randint(_SEEDS, (depths, num_requests), generator=shared)
        seeds = of_all.T[requests]
    for b, i in enumerate(requests.tolist()):
        if i in generators:
            own = generators[i].clone_state()
            torch.randint(_SEEDS, (depths,), generator=own, out=seeds[b])
    return metadata.temperature[requests], seeds


def needs_plain_rows(metadata: SamplingMetadata) -> bool:
    """Whether the batch cannot be sampled along trees: one row per request."""
    return _tracks_thinking(metadata) or metadata.max_num_logprobs == -1


def _tracks_thinking(metadata: SamplingMetadata) -> bool:
    """Whether any request has a budget of thinking tokens."""
    holder = metadata.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


def takes_argmax(metadata: SamplingMetadata) -> bool:
    """Whether every token of the batch is the argmax of the raw logits."""
    return metadata.all_greedy and _takes_raw_logits(metadata)


def _takes_raw_logits(metadata: SamplingMetadata) -> bool:
    """Whether nothing moves the argmax of a row, or asks for its logprobs."""
    return (
        metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not _tracks_thinking(metadata)
        and not _has_active(metadata.logitsprocs.non_argmax_invariant)
    )


def _has_active(processors: list[LogitsProcessor]) -> bool:
    """Whether any processor may touch a row; vLLM always loads its own three."""
    for processor in processors:
        match processor:
            case MinPLogitsProcessor():
                active = processor.min_p_count > 0
            case LogitBiasLogitsProcessor():
                active = bool(processor.biases)
            case MinTokensLogitsProcessor():
                active = bool(processor.min_toks)
            case _:
                active = True
        if active:
            return True
    return False


def _rows_are_independent(metadata: SamplingMetadata) -> bool:
    """Whether a row needs only its own temperature, top-k, top-p and generator."""
    processors = metadata.logitsprocs
    return _takes_raw_logits(metadata) and not _has_active(processors.argmax_invariant)


def _by_node(by_row: torch.Tensor, step: StepTrees) -> torch.Tensor:
    """[rows] values as [b, T]; meaningless at nodes without logits."""
    return by_row[torch.from_numpy(step.flat.logits_node).clamp(min=0)]


def _draw_along(
    walk: Walk,
    runner: CPUModelRunner,
    step: StepTrees,
    logits: torch.Tensor,
    metadata: SamplingMetadata,
) -> LogprobsTensors | None:
    """Call the sampler level by level, on the requests still walking.

    Where rows are independent nothing but `Sampler.sample` would touch them.

    Returns:
        of [num_requests * levels] rows, if asked for.
    """
    num_requests = step.num_requests
    if _rows_are_independent(metadata):
        while len(walk.alive):
            row = torch.from_numpy(walk.logits_row[walk.alive])
            drawn, _ = runner.sampler.sample(
                logits.index_select(0, row),
                _at_level(metadata, walk.alive, num_requests),
            )
            walk.advance(drawn.long().numpy())
        return None

    history = runner.input_batch.req_output_token_ids
    logprobs: list[LogprobsTensors] = []
    while len(walk.alive):
        # Every row, for processors are keyed by row; but only the walking requests
        # draw from their generators.
        walking = set(walk.alive.tolist())
        generators = {i: g for i, g in metadata.generators.items() if i in walking}
        output = runner.sampler(
            logits.index_select(0, torch.from_numpy(walk.logits_row)),
            # Each request has one row here, whatever it was scheduled.
            replace(metadata, generators=generators, spec_token_ids=None),
        )
        if output.logprobs_tensors is not None:
            logprobs.append(output.logprobs_tensors)
        drawn = output.sampled_token_ids[:, 0].long().numpy()[walk.alive]
        walk.advance(drawn)
        for i in walk.alive:
            history[i].append(int(walk.tokens[i, walk.level - 1]))
        if len(walk.alive):
            for processor in metadata.logitsprocs.all:
                processor.update_state(None)
    # vLLM appends what was emitted itself.
    for i in step.requests:
        extra = int((walk.tokens[i] != EMPTY).sum()) - 1
        if extra:
            del history[i][-extra:]
    return _stack(logprobs)


def _at_level(
    metadata: SamplingMetadata, alive: np.ndarray, num_requests: int
) -> SamplingMetadata:
    """Sampling metadata of the requests still walking."""
    if len(alive) == num_requests:
        return metadata

    def rows(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[torch.from_numpy(alive)]

    generators = {
        k: metadata.generators[i]
        for k, i in enumerate(alive.tolist())
        if i in metadata.generators
    }
    return replace(
        metadata,
        temperature=rows(metadata.temperature),
        top_p=rows(metadata.top_p),
        top_k=rows(metadata.top_k),
        generators=generators,
    )


def _stack(levels: list[LogprobsTensors]) -> LogprobsTensors | None:
    """Logprobs of all levels, request by request as vLLM expects them."""
    if not levels:
        return None
    ids, values, ranks, *_ = zip(*levels, strict=True)
    return LogprobsTensors(
        *(torch.stack(part, 1).flatten(0, 1) for part in (ids, values, ranks))
    )
