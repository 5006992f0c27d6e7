# SPDX-License-Identifier: Apache-2.0
"""Structured output on V2: the masks that the scheduler made, on the rows of trees.

vLLM 0.32 and 0.33 lay out the rows of a bitmask differently; `mask_starts` and
`fit_masks` are where that is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

from vllm_lookahead.core.tree import CANDIDATE, ROOT


class _Rows(NamedTuple):
    """As much of an `InputBatch` as the grammar's worker reads."""

    req_ids: list[str]
    cu_num_logits: torch.Tensor
    cu_num_logits_np: np.ndarray
    num_draft_tokens_per_req: np.ndarray


def forbid_drafts(
    kinds: torch.Tensor, input_batch: InputBatch, grammar_output: GrammarOutput
) -> None:
    """Take candidates out of the trees that the grammar has not looked at.

    Beyond what it accepts, their masks allow every token.

    Args:
        kinds: [B, T] int32 of the trees, in and out.
        input_batch: of the step.
        grammar_output: with the number of acceptable drafts of each request.
    """
    acceptable = grammar_output.num_acceptable_drafts
    if acceptable is None:
        acceptable = [0] * len(grammar_output.structured_output_request_ids)
    limits = dict(
        zip(grammar_output.structured_output_request_ids, acceptable, strict=True)
    )
    most = np.iinfo(np.int32).max
    limit = np.array([limits.get(r, most) for r in input_batch.req_ids], dtype=np.int32)
    limit = async_tensor_h2d(limit, device=kinds.device)
    node = torch.arange(kinds.shape[1], dtype=torch.int32, device=kinds.device)
    kinds.masked_fill_((node > limit[:, None]) & (kinds == CANDIDATE), ROOT)


def apply_grammar(
    worker: StructuredOutputsWorker,
    logits: torch.Tensor,
    input_batch: InputBatch,
    grammar_output: GrammarOutput,
    num_scheduled: Mapping[str, int],
    first: int,
    end: int,
    cu_rows: torch.Tensor,
) -> None:
    """Mask the logits of requests first..end-1, in place.

    Args:
        worker: vLLM's.
        logits: [rows, vocab_size] of these requests.
        input_batch: of the step.
        grammar_output: bitmasks of the requests with a grammar, whose trees are chains.
        num_scheduled: request id -> drafts that the scheduler made masks of, of those
            that have any; a chain that is cut has fewer.
        first, end: of the batch.
        cu_rows: [end - first + 1] int32, first row of each of them.
    """
    ids = grammar_output.structured_output_request_ids
    req_ids = input_batch.req_ids[first:end]
    inside = set(req_ids)
    chosen = [i for i, r in enumerate(ids) if r in inside]
    if not chosen:
        return
    drafts = input_batch.num_draft_tokens_per_req
    fed = dict(zip(input_batch.req_ids, drafts + 1, strict=True))
    starts = mask_starts(worker, [1 + num_scheduled.get(r, 0) for r in ids])
    # vLLM 0.32 takes as many masks of a request as it has rows, 0.33 all of them.
    cut = hasattr(worker, "num_bonus_tokens")
    ends = [starts[i] + fed[ids[i]] if cut else starts[i + 1] for i in chosen]
    masks = np.concatenate(
        [np.arange(starts[i], e) for i, e in zip(chosen, ends, strict=True)]
    )
    worker.apply_grammar_bitmask(
        logits,
        _Rows(req_ids, cu_rows, input_batch.cu_num_logits_np, drafts[first:end]),
        [ids[i] for i in chosen],
        grammar_output.grammar_bitmask[masks],
    )


def mask_starts(worker: StructuredOutputsWorker, counts: Sequence[int]) -> np.ndarray:
    """Where each grammar request's rows begin in the scheduler's bitmask.

    Args:
        worker: vLLM's. That of 0.33 gives every request `mask_stride` rows, that of
            0.32, which knows of bonus tokens, as many as it has scheduled tokens.
        counts: scheduled tokens of each request, drafts and one.

    Returns:
        [len(counts) + 1] int64, the last one the number of all rows.
    """
    if not hasattr(worker, "num_bonus_tokens"):
        counts = [worker.mask_stride] * len(counts)
    return np.cumsum([0, *counts])


def fit_masks(
    worker: StructuredOutputsWorker, grammar_output: GrammarOutput
) -> GrammarOutput:
    """The rows of bitmask that vLLM 0.33's worker has room for.

    They are `mask_stride` a request. vLLM's warm-up sends as many as a request may
    have tokens in a step, which of a tree are more.
    """
    if hasattr(worker, "num_bonus_tokens"):
        return grammar_output
    rows = len(grammar_output.structured_output_request_ids) * worker.mask_stride
    bitmask = grammar_output.grammar_bitmask[:rows]
    return replace(grammar_output, grammar_bitmask=bitmask)
