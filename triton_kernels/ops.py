# SPDX-License-Identifier: Apache-2.0
"""`LookaheadOps` on Triton: no allocation and no sync in the step."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.draft.estimate import WEIGHTS, Hints
from vllm_lookahead.core.draft.index import num_cells
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import MAX_TREE_NODES, LookaheadParams
from vllm_lookahead.triton_kernels import (
    answers,
    compact,
    draft,
    index,
    mask,
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
        *,
        max_tokens: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        """
        Args:
            params: the server's.
            max_num_reqs: of a batch.
            device: of all buffers.
            max_tokens: that a block table has room for; by default `draft` allocates
                tables when it first sees one that is wider.
            max_rows: of a step's logits; by default a whole tree of each request.
        """
        n, g = params.ngram_size, params.verification_set_size
        self._n, self._g, self._max_tokens = n, g, max_tokens
        self._budget = params.max_tree_size
        t = replace(params, node_budget=MAX_TREE_NODES).max_tree_size

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty((max_num_reqs, *shape), dtype=dtype, device=device)

        self._tables = index.IndexTables.allocate(max_num_reqs, max_tokens or 1, device)
        self._scratch = draft.DraftScratch.allocate(max_num_reqs, g * (n - 1), device)
        self._tree = [*(empty(t) for _ in range(4)), empty()]  # fields of `DraftTree`
        self._chances = empty(t, dtype=torch.float32)
        self._emitted, self._path, self._num_emitted = empty(n), empty(n), empty()
        shape = max_rows or max_num_reqs * t, NUM_ANSWERS
        self._said = torch.empty(shape, dtype=torch.int32, device=device)
        self._logprobs = torch.empty(shape, dtype=torch.float32, device=device)
        self._caches: list[torch.Tensor] = []
        self._groups: list[compact.LayerCaches] = []

    write_tokens = staticmethod(write.write_tokens)
    update = staticmethod(update.update)
    keep_answers = staticmethod(answers.keep_answers)

    def draft(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        hints: Hints,
        max_candidates: int,
        weights: Mapping[str, float] = WEIGHTS,
    ) -> tuple[DraftTree, torch.Tensor]:
        if max_candidates != self._g:
            raise ValueError(
                f"max_candidates={max_candidates}, but buffers for {self._g}"
            )
        b, max_blocks = batch.block_table.shape
        if self._max_tokens is None:
            self._widen_tables(max_blocks * pages.block_size)
        tree = DraftTree(*(column[:b] for column in self._tree))
        chances = self._chances[:b]
        if self._g:
            index.file_contexts(pages, batch, self._tables)
        draft.draft_trees(
            pages, batch, hints, weights, self._tables, self._scratch, tree, chances
        )
        return tree.first_nodes(self._budget), chances[:, : self._budget]

    def _widen_tables(self, max_tokens: int) -> None:
        rows, cells = self._tables.text.shape
        if cells < num_cells(max_tokens):
            device = self._tables.text.device
            self._tables = index.IndexTables.allocate(rows, max_tokens, device)

    def verify(
        self, tree: DraftTree, sampled: torch.Tensor, max_emitted: int
    ) -> Verdict:
        if max_emitted != self._n:
            raise ValueError(f"max_emitted={max_emitted}, but buffers for {self._n}")
        b = sampled.shape[0]
        verdict = Verdict(self._emitted[:b], self._path[:b], self._num_emitted[:b])
        verify.verify(tree, sampled, verdict)
        return verdict

    def likeliest_tokens(
        self, logits: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`core.answers.likeliest_tokens`, of the step's rows from the first on."""
        end = first + logits.shape[0]
        said, logprobs = self.kept_likeliest(end)
        result = said[first:], logprobs[first:]
        answers.likeliest_tokens(logits, *result)
        return result

    def kept_likeliest(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What `likeliest_tokens` has said of the step's first rows."""
        if num_rows > len(self._said):
            most = len(self._said)
            raise ValueError(f"{num_rows} rows of logits, but buffers for {most}")
        return self._said[:num_rows], self._logprobs[:num_rows]

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
        hints: Hints | None = None,
        logits_dtype: torch.dtype = torch.bfloat16,
        draft_table: torch.Tensor | None = None,
    ) -> None:
        """Compile every kernel before a request waits for it.

        A block table that is wider than `max_tokens`, for vLLM rounds up, is given
        its tables here.

        Args:
            pages, block_table, caches: the engine's own. Nothing in them changes.
            hints: as `draft` will get them, of at least one request; by default tables
                of NUM_SUCCESSORS tokens.
            logits_dtype: of the logits that `likeliest_tokens` will get.
            draft_table: the block table that `draft` will get, if it is another one.
        """
        n, g, t = self._n, self._g, self._budget
        if draft_table is None:
            draft_table = block_table
        self._widen_tables(draft_table.shape[1] * pages.block_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=block_table.device)

        if hints is None:
            hints = Hints(
                bigrams=zeros(1, NUM_SUCCESSORS),
                bigram_logprobs=zeros(1, NUM_SUCCESSORS, dtype=torch.float32),
                temperature=zeros(1, dtype=torch.float32),
                seeds=zeros(1, n - 1, dtype=torch.int64),
                noise=gpu_noise,
            )
        one = replace(hints, temperature=hints.temperature[:1], seeds=hints.seeds[:1])
        padding = RequestBatch(block_table[:1], *zeros(6, 1).unbind(0))
        self.write_tokens(pages, zeros(1, dtype=torch.int64) - 1, zeros(1))
        to_draft = replace(padding, block_table=draft_table[:1])
        tree, _ = self.draft(pages, to_draft, one, g)
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
        said = self.likeliest_tokens(zeros(1, 1, dtype=logits_dtype))
        self.keep_answers(pages, padding, tree, verdict, Answers(*said, zeros(1)))
