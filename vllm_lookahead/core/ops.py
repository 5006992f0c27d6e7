# SPDX-License-Identifier: Apache-2.0
"""The operations of a lookahead step, and their PyTorch implementation.

An engine calls them in this order, for all requests of the step at once:

    write_tokens   tokens whose K/V the step computes for good (prompts, roots)
    propose        look up the pool, ask the model's bigrams where it has nothing, read
                   the window, build the trees; or
    grow           where nodes must be worth their time, choose them one by one
    (forward pass over the trees; sample at the root and the candidates)
    verify         walk the trees
    compact        move the accepted K/V into place
    update         record the output, harvest and slide the window
"""

from typing import Protocol

import torch

from vllm_lookahead.core import pages as pages_lib
from vllm_lookahead.core import verify as verify_lib
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.best_first import grow
from vllm_lookahead.core.bigrams import complete
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.pool import lookup
from vllm_lookahead.core.tree import DraftTree, build_tree
from vllm_lookahead.core.verify import Verdict, accepted_moves, move_slots
from vllm_lookahead.core.window import read_window, update_window


class LookaheadOps(Protocol):
    """Each op takes all requests of the step; shapes as in the modules above."""

    def write_tokens(
        self, pages: BlockPages, slots: torch.Tensor, tokens: torch.Tensor
    ) -> None: ...

    def propose(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        max_candidates: int,
        bigrams: torch.Tensor | None = None,
    ) -> DraftTree: ...

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


class TorchOps:
    """`LookaheadOps` in PyTorch: the oracle of the kernels."""

    write_tokens = staticmethod(pages_lib.write_tokens)
    grow = staticmethod(grow)
    verify = staticmethod(verify_lib.verify)

    @staticmethod
    def propose(
        pages: BlockPages,
        batch: RequestBatch,
        max_candidates: int,
        bigrams: torch.Tensor | None = None,
    ) -> DraftTree:
        candidates = lookup(pages, batch, max_candidates)
        if bigrams is not None:
            candidates = complete(candidates, batch, bigrams)
        return build_tree(batch, candidates, read_window(pages, batch))

    @staticmethod
    def compact(
        caches: list[torch.Tensor],
        batch: RequestBatch,
        verdict: Verdict,
        block_size: int,
    ) -> None:
        src, dst = accepted_moves(batch, verdict, block_size)
        moved = src != dst
        if moved.any():
            move_slots(caches, src[moved], dst[moved])

    @staticmethod
    def update(
        pages: BlockPages,
        batch: RequestBatch,
        tree: DraftTree,
        sampled: torch.Tensor,
        verdict: Verdict,
    ) -> None:
        # The last token emitted is the next root: its K/V is not computed yet.
        ahead = torch.arange(1, verdict.tokens.shape[1], device=sampled.device)
        position = batch.position[:, None].long() + ahead
        final = ahead < verdict.num_emitted[:, None]
        slots = batch.slots(position.where(final, pages_lib.EMPTY), pages.block_size)
        pages_lib.write_tokens(pages, slots.flatten(), verdict.tokens[:, :-1].flatten())
        update_window(pages, batch, tree, sampled, verdict.num_emitted)
