# SPDX-License-Identifier: Apache-2.0
"""Keep what the model said after each node: its likeliest next tokens.

A node that was rejected was read by the model all the same. A later step that reaches
the same last tokens drafts what the model said there (cf. Luo et al. 2024, "Turning
Trash into Treasure", which keeps such answers by the last token alone).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.pages import (
    CONTEXT,
    EMPTY,
    NUM_ANSWERS,
    BlockPages,
    oldest_first,
    until_empty,
)
from vllm_lookahead.core.tree import CANDIDATE, DraftTree, Node
from vllm_lookahead.core.verify import Verdict

# Answers of at most so many rejected nodes of a step are kept, of the likeliest.
MAX_REJECTED = 64
LANES = 1024  # into which a row of logits is cut to find its likeliest tokens


@dataclass
class Answers:
    """The model's likeliest tokens after the nodes of a step.

    Attributes:
        tokens: [n, R] int32, the likeliest first.
        logprobs: [n, R] float32, of each.
        first_row: [B] int32, row of each tree's root; its candidates' rows follow.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    first_row: torch.Tensor


class Answer(NamedTuple):
    """One of them, as a page keeps it.

    Attributes:
        context: the node's token and those before it, the nearest first, as far as
            they are known; at most CONTEXT.
        successors: what may follow, and its log-probability.
    """

    context: list[int]
    successors: dict[int, float]


def likeliest_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens of rows of logits, or nearly.

    Of the tokens that are the same modulo LANES only the likeliest counts: this is what
    one pass over a row can tell.

    Args:
        logits: [n, V] of any floating dtype.

    Returns:
        tokens: [n, R] int32, the likeliest first, EMPTY where there are no more.
        logprobs: [n, R] float32, among the likeliest tokens of all lanes: a little too
            high, as the rest of the vocabulary is left out.
    """
    tokens = torch.full((len(logits), NUM_ANSWERS), EMPTY, dtype=torch.int32)
    logprobs = torch.zeros(len(logits), NUM_ANSWERS)
    for row, values in enumerate(logits.tolist()):
        lanes: dict[int, tuple[float, int]] = {}
        for token, logit in enumerate(values):
            if logit > lanes.get(token % LANES, (-math.inf, EMPTY))[0]:
                lanes[token % LANES] = logit, token
        of_lanes = torch.tensor([x for x, _ in lanes.values()], dtype=torch.float64)
        total = float(of_lanes.logsumexp(0))
        ranked = sorted(lanes.items(), key=lambda lane: (-lane[1][0], lane[0]))
        for i, (_, (logit, token)) in enumerate(ranked[:NUM_ANSWERS]):
            tokens[row, i], logprobs[row, i] = token, logit - total
    return tokens, logprobs


def keep_answers(
    pages: BlockPages,
    batch: RequestBatch,
    tree: DraftTree,
    verdict: Verdict,
    answers: Answers,
) -> None:
    """Put a step's answers into the pages of the new tail blocks.

    The likeliest rejected nodes', the least likely of them first, then those of the
    path: what is put later is newer.

    Args:
        pages: written in place, after `update`.
        batch: the requests as they were when the trees were drafted.
        tree: as fed. One of 0 nodes is padding.
        verdict: which nodes were accepted.
        answers: of the root and the candidates.
    """
    if not pages.answers.shape[1]:
        return
    size = pages.block_size
    paths, counts = verdict.path.tolist(), verdict.num_emitted.tolist()
    first_rows = answers.first_row.tolist()
    for b, (request, nodes) in enumerate(
        zip(batch.requests(), tree.nodes(), strict=True)
    ):
        if not nodes:
            continue
        path = paths[b][: counts[b]]
        candidates = [i for i, node in enumerate(nodes) if node.kind == CANDIDATE]
        rejected = [i for i in candidates if i not in path][:MAX_REJECTED]
        last = request.position + counts[b] - 1
        block = request.blocks[last // size]
        history = pages.history(request)
        for i in [*rejected[::-1], *path]:
            count = int(pages.answer_count[block])
            cell = block, count % pages.answers.shape[1]
            row = first_rows[b] + i
            context = torch.tensor(_context(history, nodes, i), dtype=torch.int32)
            pages.answers[cell] = torch.cat([context, answers.tokens[row]])
            pages.answer_logprobs[cell] = answers.logprobs[row]
            pages.answer_count[block] = count + 1


def read_answers(pages: BlockPages, request: Request) -> list[Answer]:
    """Those of a request's recent blocks, the oldest first."""
    found = []
    for block in pages.recent_blocks(request):
        kept = pages.answers.shape[1]
        for cell in oldest_first(pages.answer_count[block], kept):
            entry = pages.answers[block, cell].tolist()
            logprobs = pages.answer_logprobs[block, cell].tolist()
            said = dict(zip(entry[CONTEXT:], logprobs, strict=True))
            found.append(Answer(until_empty(entry[:CONTEXT]), said))
    return found


def _context(history: list[int], nodes: Sequence[Node], i: int) -> list[int]:
    """The last tokens up to a node, the nearest first, EMPTY before the text."""
    branch = []
    while i != EMPTY:
        branch.append(nodes[i].token)
        i = nodes[i].parent
    before = history[: -CONTEXT - 1 : -1]
    return [*branch, *before, *[EMPTY] * CONTEXT][:CONTEXT]
