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

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict


class LookaheadOps(Protocol):
    """Each takes all requests of a step; shapes as in the core's file of its name."""

    def write_tokens(
        self, pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor
    ) -> None: ...

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


def step(
    ops: LookaheadOps,
    draft: Callable[[BlockPages, RequestBatch], DraftTree],
    forward: Callable[[DraftTree], torch.Tensor],
    pages: BlockPages,
    caches: list[torch.Tensor],
    batch: RequestBatch,
) -> Verdict:
    """Decode up to N tokens of each request of a batch.

    Args:
        ops: what runs everything but the model.
        draft: makes the trees to feed: `draft.chains.propose` or
            `draft.best_first.grow`, given what else they take.
        forward: the model and the request's own sampler: the K/V of node i goes to the
            slot of position p+i, attention is over the context, the node's ancestors
            and itself, and the result is [B, T], the token sampled after each node.
        pages: what is known of earlier tokens, one page per K/V block.
        caches: the K/V, views of shape [num_blocks, block_size, ...].
        batch: B requests, each at its root: sampled last, its K/V not computed yet.

    Returns:
        The tokens emitted, 1 to N of each request; the last one is its next root.
    """
    ops.write_tokens(pages, batch.root_slots(pages.block_size), batch.root)
    tree = draft(pages, batch)
    sampled = forward(tree)
    verdict = ops.verify(tree, sampled, pages.ngram_size)
    ops.compact(caches, batch, verdict, pages.block_size)
    ops.update(pages, batch, tree, sampled, verdict)
    return verdict
