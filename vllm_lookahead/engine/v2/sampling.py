# SPDX-License-Identifier: Apache-2.0
"""Sample and match with vLLM's own V2 sampler.

The sampler runs once, on the root and every candidate of every tree. It keys its
noise by seed and position, so a node draws what plain decoding would draw there,
and the tokens along the accepted path are plain decoding's.
"""

from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import use_penalty
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.v2.grammar import apply_grammar, forbid_drafts
from vllm_lookahead.engine.v2.trees import StepTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.ops import TritonOps


def uses_history(
    sampler: Any, index: int, sampling_params: SamplingParams | None
) -> bool:
    """Whether a request's logits depend on the tokens before them.

    vLLM takes the rows of a request for one chain, each row's history being those
    above it. On a chain that is right, and there is no telling otherwise.
    """
    if sampling_params is None or sampler is None:
        return False
    budget = sampler.thinking_budget_state
    num_builtin = 3  # logit bias, penalties, bad words
    return (
        use_penalty(sampling_params)
        or bool(sampling_params.bad_words_token_ids)
        or sampling_params.structured_outputs is not None
        or (budget.enabled and bool(budget.use_thinking_budget[index]))
        or len(sampler.logits_processors) > num_builtin
    )


class TreeSampler:
    """Samples the steps in which some requests are fed trees.

    Attributes:
        runner: vLLM's, for its model, sampler, adapters and grammars.
        step: the trees.
        ops: to walk them with.
        params: the server's sizes.
        max_chunk_rows: most rows of logits at once.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        step: StepTrees,
        ops: TritonOps,
        params: LookaheadParams,
    ) -> None:
        self.runner: Any = runner
        self.step, self.ops, self.params = step, ops, params
        self.max_chunk_rows = get_max_chunk_logits(runner.vocab_size)

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, Verdict, Answers]:
        """Sample every request of the step.

        Args:
            hidden_states: [num_tokens, hidden_size].
            input_batch: as `StepTrees.feed` left it.
            grammar_output: bitmasks of the requests with a grammar, whose trees are
                chains.

        Returns:
            output: tokens as [B, N] int64, `num_sampled` of them good.
            verdict: of the trees, the first of the batch.
            answers: the likeliest tokens after each of their nodes.
        """
        plan = self.step.plan
        if grammar_output is not None:
            kinds = self.step.trees(input_batch.num_reqs).kinds
            forbid_drafts(kinds, input_batch, grammar_output)
        parts = [
            self._sample_requests(
                hidden_states, input_batch, grammar_output, first, end
            )
            for first, end in request_chunks(plan, self.max_chunk_rows)
        ]
        verdict, logprobs, num_nans = parts[0]
        if len(parts) > 1:
            verdicts, all_logprobs, all_nans = zip(*parts, strict=True)
            verdict = Verdict(
                torch.cat([v.tokens for v in verdicts]),
                torch.cat([v.path for v in verdicts]),
                torch.cat([v.num_emitted for v in verdicts]),
            )
            if logprobs is not None:
                b, n = verdict.path.shape
                cu_tokens = list(range(0, b * n + 1, n))
                logprobs = LogprobsTensors.cat(all_logprobs, cu_tokens)
            if num_nans is not None:
                num_nans = torch.cat(all_nans)

        # Copies: the next step's verdict is written where this one is, while this one
        # may still be on its way to the host.
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            verdict.num_emitted.clone(),
            input_batch.seq_lens,
            plan.cu_fed,
            input_batch.idx_mapping,
            self.runner.req_states.prefill_len.gpu,
        )
        output = SamplerOutput(
            verdict.tokens.long(), logprobs, num_nans, num_sampled, num_rejected
        )
        d = plan.num_trees
        verdict = Verdict(verdict.tokens[:d], verdict.path[:d], verdict.num_emitted[:d])
        num_rows = int(plan.cu_verified_np[d])
        tokens, logprobs = self.ops.kept_likeliest(num_rows)
        return output, verdict, Answers(tokens, logprobs, plan.cu_verified[:d])

    def _sample_requests(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
        first: int,
        end: int,
    ) -> tuple[Verdict, LogprobsTensors | None, torch.Tensor | None]:
        """The verdict of requests first..end-1, good until the next one."""
        step, sampler = self.step, self.runner.sampler
        plan = step.plan
        lo, hi = (int(plan.cu_verified_np[i]) for i in (first, end))
        window_lo, window_hi = (int(plan.cu_window_np[i]) for i in (first, end))
        verified, window = slice(lo, hi), slice(window_lo, window_hi)
        at = step.row_token[verified]
        cu_rows = plan.cu_verified[first : end + 1]
        if lo:
            cu_rows = cu_rows - lo
        if hi == window_lo:  # of one chunk the rows lie together
            rows = step.row_token[lo:window_hi]
        else:
            rows = torch.cat([at, step.row_token[window]])
        if self.runner.lora_config:
            self._map_adapters(input_batch, first, end)
        logits = self.runner.model.compute_logits(
            hidden_states[rows]
        )  # [rows, vocab_size]
        num_rows = hi - lo
        if window_hi > window_lo:
            refill = logits[num_rows:].argmax(-1)
            step.sampled.index_copy_(0, step.row_node[window], refill)
            logits = logits[:num_rows]
        if self.params.verification_set_size:
            self.ops.likeliest_tokens(logits, lo)
        if grammar_output is not None:
            apply_grammar(
                self.runner.structured_outputs_worker,
                logits,
                input_batch,
                grammar_output,
                self.runner.num_scheduled,
                first,
                end,
                cu_rows,
            )

        idx_mapping_np = input_batch.idx_mapping_np[first:end]
        logprobs_dims = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        num_nans = None
        if sampler.compute_nans:
            num_nans = get_num_nans(logits)[cu_rows[:-1].long()]
        sampled, processed = sampler.sample(
            logits,
            step.row_index[verified],
            input_batch.idx_mapping[first:end],
            idx_mapping_np,
            input_batch.positions[at],
            input_batch.input_ids[at],
            step.row_local[verified],
            input_batch.seq_lens_cpu_upper_bound.numpy()[first:end],
            return_logprobs=logprobs_dims is not None,
        )
        step.sampled.index_copy_(0, step.row_node[verified], sampled)
        verdict = self.ops.verify(
            step.trees(end, first),
            step.sampled_tokens(end, first),
            self.params.ngram_size,
        )
        logprobs = None
        if logprobs_dims is not None:
            if sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
                logits = processed
            logprobs = _path_logprobs(
                sampler,
                logits,
                verdict,
                cu_rows,
                input_batch,
                logprobs_dims,
                first,
                end,
            )
        if end - first < plan.num_requests:
            verdict = Verdict(
                verdict.tokens.clone(),
                verdict.path.clone(),
                verdict.num_emitted.clone(),
            )
        return verdict, logprobs, num_nans

    def _map_adapters(self, input_batch: InputBatch, first: int, end: int) -> None:
        """Tell the head which LoRA adapter each row has: vLLM maps one a request."""
        plan, state = self.step.plan, self.runner.lora_state
        ids = state.lora_ids[input_batch.idx_mapping_np]
        counts = plan.cu_verified_np, plan.cu_window_np
        by_row = [ids[first:end].repeat(np.diff(cu[first : end + 1])) for cu in counts]
        self.runner._set_active_loras(
            tuple(np.concatenate(by_row)),
            tuple(ids.repeat(input_batch.num_scheduled_tokens)),
            state.get_activate_loras(input_batch.req_ids),
        )


def request_chunks(plan: Any, max_rows: int) -> list[tuple[int, int]]:
    """Ranges of requests whose logits fit together, as few as can be."""
    cu_rows = plan.cu_verified_np + plan.cu_window_np - plan.cu_window_np[0]
    chunks, first = [], 0
    while first < plan.num_requests:
        end = int(np.searchsorted(cu_rows, cu_rows[first] + max_rows, "right")) - 1
        chunks.append((first, max(end, first + 1)))
        first = chunks[-1][1]
    return chunks


def _path_logprobs(
    sampler: Any,
    logits: torch.Tensor,
    verdict: Verdict,
    cu_rows: torch.Tensor,
    input_batch: InputBatch,
    logprobs_dims: tuple[int, int],
    first: int,
    end: int,
) -> LogprobsTensors:
    """Scores of the emitted tokens, N rows per request.

    The rows are copied for as many requests at once as the logits have room for.
    """
    num_logprobs, max_token_ids = logprobs_dims
    b, n = verdict.path.shape
    rows = (cu_rows[:-1, None] + verdict.path.clamp(min=0)).long()
    tokens = verdict.tokens.clamp(min=0).long()
    index = input_batch.idx_mapping[first:end]
    at_once = max(1, len(logits) // n)
    parts = []
    for at in range(0, b, at_once):
        some = slice(at, at + at_once)
        count = len(index[some])
        parts.append(
            compute_topk_scores(
                logits[rows[some].view(-1)],
                num_logprobs,
                tokens[some].view(-1),
                list(range(0, count * n + 1, n)),
                logprob_token_ids_state=sampler.logprob_token_ids_state,
                expanded_idx_mapping=index[some].repeat_interleave(
                    n, output_size=count * n
                ),
                max_per_req_token_ids=max_token_ids,
                logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
            )
        )
    return LogprobsTensors.cat(parts, list(range(0, b * n + 1, n)))
