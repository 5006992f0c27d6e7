# SPDX-License-Identifier: Apache-2.0
"""One step of lookahead decoding, top to bottom.

Every request feeds a draft tree in place of one token; what the model would have said
anyway is kept (Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using
Lookahead Decoding", with every source of drafts under one root).

Tests run `step` itself, with each implementation of the operations: Numba's, Triton's
and the plain loops of `core.reference`. In an engine vLLM's model runner calls the same
operations one by one; `docs/step.md` says from where.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict


class LookaheadOps(Protocol):
    """Each takes all requests of a step; shapes as in the core's file of its name."""

    def write_tokens(
        self, pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor
    ) -> None: ...

    def draft(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        hints: Hints,
        max_candidates: int,
    ) -> tuple[DraftTree, torch.Tensor]: ...

    def verify(
        self, tree: DraftTree, sampled: torch.Tensor, max_emitted: int
    ) -> Verdict: ...

    def compact(
        self,
        caches: list[torch.Tensor],
        batch: RequestBatch,
        verdict: Verdict,
        block_size: int,
    ) -> None: ...

    def update(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        tree: DraftTree,
        sampled: torch.Tensor,
        verdict: Verdict,
    ) -> None: ...

    def keep_answers(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        tree: DraftTree,
        verdict: Verdict,
        answers: Answers,
    ) -> None: ...


def step(
    ops: LookaheadOps,
    forward: Callable[[DraftTree], tuple[torch.Tensor, Answers]],
    pages: BlockPages,
    caches: list[torch.Tensor],
    batch: RequestBatch,
    hints: Hints,
    max_candidates: int,
) -> Verdict:
    """Decode up to N tokens of each request of a batch.

    Args:
        ops: what runs everything but the model.
        forward: the model and the request's own sampler: the K/V of node i goes to the
            slot of position p+i, attention is over the context, the node's ancestors
            and itself. Of each node it gives the token sampled after it, [B, T], and
            the likeliest ones.
        pages: what is known of earlier tokens, one page per K/V block.
        caches: the K/V, views of shape [num_blocks, block_size, ...].
        batch: B requests, each at its root: sampled last, its K/V not computed yet.
        hints: what else is known of the tokens to come. Drafting reads nothing that
            `write_tokens` writes here, so engines draft first.
        max_candidates: G of the server.

    Returns:
        The tokens emitted, 1 to N of each request; the last one is its next root.
    """
    ops.write_tokens(pages, batch.root_slots(pages.block_size), batch.root)
    tree, _ = ops.draft(pages, batch, hints, max_candidates)
    sampled, answers = forward(tree)
    verdict = ops.verify(tree, sampled, pages.ngram_size)
    ops.compact(caches, batch, verdict, pages.block_size)
    ops.update(pages, batch, tree, sampled, verdict)
    ops.keep_answers(pages, batch, tree, verdict, answers)
    return verdict
