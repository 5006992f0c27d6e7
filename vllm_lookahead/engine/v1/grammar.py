# SPDX-License-Identifier: Apache-2.0
"""Structured output on V1: the masks that the scheduler made, on the rows of chains."""

from collections.abc import Mapping

import numpy as np
import torch
import xgrammar
from vllm.v1.core.sched.output import GrammarOutput

from vllm_lookahead.core.tree import CANDIDATE, ROOT
from vllm_lookahead.engine.v1.trees import StepTrees


def apply_grammar(
    logits: torch.Tensor,
    step: StepTrees,
    req_ids: list[str],
    num_scheduled: Mapping[str, int],
    grammar_output: GrammarOutput,
) -> torch.Tensor:
    """Mask logits, and take candidates out that the grammar has not looked at.

    Why not vLLM's: it takes a request's masks to be as many as its rows of logits.
    There is one of each draft scheduled, and from vLLM 0.33 on N of every request.

    Args:
        logits: [rows, vocab_size], laid out as `step.flat.logits_indices`.
        step: whose trees of requests with a grammar are chains.
        req_ids: of the batch.
        num_scheduled: request id -> drafts, of those that have any.
        grammar_output: masks, and the number of acceptable drafts.

    Returns:
        [rows, vocab_size] float32.
    """
    masks = grammar_output.grammar_bitmask
    ids = grammar_output.structured_output_request_ids
    counts = [1 + num_scheduled.get(r, 0) for r in ids]
    if len(masks) != sum(counts):
        counts = [len(masks) // len(ids)] * len(ids)
    start = dict(zip(ids, np.cumsum([0, *counts]).tolist(), strict=False))
    by_row = np.full((len(logits), masks.shape[1]), -1, np.int32)
    constrained: list[int] = []
    for i, request_id in enumerate(req_ids):
        if request_id in start:
            first, end = step.flat.logits_start[i : i + 2].tolist()
            at = start[request_id]
            by_row[first:end] = masks[at : at + end - first]
            constrained.extend(range(first, end))
    logits = logits.float()
    xgrammar.apply_token_bitmask_inplace(
        logits, torch.from_numpy(by_row), indices=constrained
    )
    acceptable = grammar_output.num_acceptable_drafts or [0] * len(ids)
    limits = dict(zip(ids, acceptable, strict=True))
    limit = torch.tensor(
        [limits.get(r, step.tree.kinds.shape[1]) for r in step.request_ids]
    )
    node = torch.arange(step.tree.kinds.shape[1])
    forbidden = (node > limit[:, None]) & (step.tree.kinds == CANDIDATE)
    step.tree.kinds.masked_fill_(forbidden, ROOT)
    return logits
