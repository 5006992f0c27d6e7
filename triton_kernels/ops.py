# SPDX-License-Identifier: Apache-2.0
"""`LookaheadOps` on Triton: no allocation and no sync in the step."""

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels import bigrams as bigram_kernels
from vllm_lookahead.triton_kernels import (
    chains,
    compact,
    mask,
    pool,
    update,
    verify,
    write,
)


class TritonOps:
    """The kernels, with the buffers that they write.

    Results are views of these buffers: good until the same op is called again, in
    the order of the stream. A request with `max_nodes`, `verification_set_size` and
    `window_size` 0 is padding, for CUDA graphs: its tree has no node, and nothing
    of its pages, block table or K/V is touched.
    """

    def __init__(
        self,
        params: LookaheadParams,
        max_num_reqs: int,
        device: torch.device | str = "cpu",
    ) -> None:
        n, g = params.ngram_size, params.verification_set_size
        self._n, self._g = n, g

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty((max_num_reqs, *shape), dtype=torch.int32, device=device)

        self._scratch = pool.LookupScratch.allocate(max_num_reqs, g, device)
        self._candidates = empty(g, n - 1)
        columns = [empty(params.max_tree_size) for _ in range(4)]
        self._tree = [*columns, empty()]  # the fields of `DraftTree`
        self._emitted, self._path, self._num_emitted = empty(n), empty(n), empty()
        self._caches: list[torch.Tensor] = []
        self._groups: list[compact.LayerCaches] = []

    write_tokens = staticmethod(write.write_tokens)
    update = staticmethod(update.update)

    def propose(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        max_candidates: int,
        bigrams: torch.Tensor | None = None,
    ) -> DraftTree:
        if max_candidates != self._g:
            raise ValueError(
                f"max_candidates={max_candidates}, but buffers for {self._g}"
            )
        b = batch.block_table.shape[0]
        candidates = self._candidates[:b]
        pool.lookup(pages, batch, self._scratch, candidates)
        if bigrams is not None:
            bigram_kernels.complete(candidates, batch, bigrams)
        tree = DraftTree(*(column[:b] for column in self._tree))
        chains.build_tree(pages, batch, candidates, tree)
        return tree

    def verify(
        self, tree: DraftTree, sampled: torch.Tensor, max_emitted: int
    ) -> Verdict:
        if max_emitted != self._n:
            raise ValueError(f"max_emitted={max_emitted}, but buffers for {self._n}")
        b = sampled.shape[0]
        verdict = Verdict(self._emitted[:b], self._path[:b], self._num_emitted[:b])
        verify.verify(tree, sampled, verdict)
        return verdict

    def compact(
        self,
        caches: list[torch.Tensor],
        batch: RequestBatch,
        verdict: Verdict,
        block_size: int,
    ) -> None:
        """As `core.compact`. Caches other than the last ones cost a copy to the GPU."""
        if caches is not self._caches:
            self._caches, self._groups = caches, compact.LayerCaches.group(caches)
        for group in self._groups:
            compact.compact(group, batch, verdict, block_size)

    def warm_up(
        self,
        pages: BlockPages,
        block_table: torch.Tensor,
        caches: list[torch.Tensor],
    ) -> None:
        """Compile every kernel before a request waits for it.

        Args:
            pages, block_table, caches: the engine's own. Nothing in them changes.
        """
        n, g, t = self._n, self._g, self._tree[0].shape[1]

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=block_table.device)

        padding = RequestBatch(block_table[:1], *zeros(6, 1).unbind(0))
        self.write_tokens(pages, zeros(1, dtype=torch.int64) - 1, zeros(1))
        tree = self.propose(pages, padding, g, zeros(1, 1))
        mask.build_mask(
            tree,
            padding.position,
            zeros(2),
            zeros(1, t, -(-t // 32)),
            zeros(1, dtype=torch.int64),
            zeros(1),
        )
        sampled = zeros(1, t, dtype=torch.int64)
        verdict = self.verify(tree, sampled, n)
        self.compact(caches, padding, verdict, pages.block_size)
        self.update(pages, padding, tree, sampled, verdict)
