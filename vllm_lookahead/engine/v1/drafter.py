# SPDX-License-Identifier: Apache-2.0
"""Draft for a step: gather what is known, grow trees, cut them, lay them out."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.sampling_params import SamplingParams

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.outputs import LookaheadSchedulerOutput
from vllm_lookahead.engine.page_memory import kept_blocks
from vllm_lookahead.engine.paths import Paths, follow
from vllm_lookahead.engine.v1.forest import Forest
from vllm_lookahead.engine.v1.sampling import needs_plain_rows, upcoming_noise
from vllm_lookahead.engine.v1.trees import StepTrees
from vllm_lookahead.numba_kernels.layout import (
    INDEX,
    POSITION,
    lay_out,
    size_trees,
)
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.numba_kernels.tables import Tables
from vllm_lookahead.params import LookaheadParams, request_params


class TreeDrafter:
    """What drafts are made of, and what they may cost.

    Attributes:
        server: the sizes that the server was started with, the most of each.
        branches: whether trees may; else they are chains.
        ranks_nodes: whether trees are cut to the nodes that are worth their time.
        sizes: those of each request that drafts.
        grammars: those of these requests that have one.
        bigrams: [V, R] int32, see `core.draft.bigrams`; V is 0 before the model was
            asked.
        bigram_logprobs: [V, R] float32 of them.
        forest: what is fed of the drafts.
        tables: what is filed of the requests' pages.
        corpus: other requests' blocks, if they are drafted from.
    """

    def __init__(
        self, server: LookaheadParams, ops: NumbaOps, max_num_tokens: int
    ) -> None:
        """
        Args:
            server: as the attribute.
            ops: to draft with.
            max_num_tokens: of a step.
        """
        self.server, self.ops = server, ops
        self.branches, self.ranks_nodes = server.can_branch, True
        self.sizes: dict[str, LookaheadParams] = {}
        self.grammars: set[str] = set()
        self.bigrams = torch.zeros(0, 0, dtype=torch.int32)
        self.bigram_logprobs = torch.zeros(0, 0)
        self.forest = Forest(max_num_tokens)
        self.tables = Tables()
        self.corpus: Corpus | None = None
        self._step_start = time.perf_counter()

    def add_request(self, request_id: str, sampling: SamplingParams | None) -> None:
        sizes = request_params(sampling and sampling.extra_args, self.server)
        if sizes is None:
            return
        has_grammar = sampling is not None and sampling.structured_outputs is not None
        if has_grammar:
            self.grammars.add(request_id)
        if has_grammar or not self.branches:
            sizes = sizes.chain
        self.sizes[request_id] = sizes

    def remove_request(self, request_id: str) -> None:
        self.sizes.pop(request_id, None)
        self.tables.remove(request_id)
        self.grammars.discard(request_id)

    def start_step(self, last: StepTrees | None) -> None:
        """Learn from the step that ends now, if it had trees only, what nodes cost."""
        now, start = time.perf_counter(), self._step_start
        self._step_start = now
        if last is None or last.verdict is None or not last.only_decodes:
            return
        has_learned = self.forest.observe_step(
            now - start, last.num_tokens, last.chances, last.verdict
        )
        if has_learned and get_tp_group().world_size > 1:
            # Every rank must feed the same, and each has a clock of its own.
            get_tp_group().broadcast(self.forest.step_time.learned)

    def draft(
        self,
        runner: Any,
        output: LookaheadSchedulerOutput,
        pages: BlockPages,
    ) -> StepTrees:
        """Draft for every request with placeholders, and widen `output` to match.

        Args:
            runner: ours, between two steps.
            output: the scheduler's, of the step to come.
            pages: what is known of the requests' texts.
        """
        inputs = runner.input_batch
        placeholders = output.scheduled_spec_decode_tokens
        wanted = {r: output.max_nodes[r] for r in placeholders}
        ids, table = self._wanted(wanted, inputs, inputs.num_computed_tokens_cpu)
        batch, tree, chances = self._grow(runner, pages, ids, table)
        if output.paths:
            tree = self._follow(output.paths, ids, batch, tree, chances)
        requests = table[:, INDEX].copy()
        scheduled = output.num_scheduled_tokens
        num_tokens = np.array([scheduled[r] for r in inputs.req_ids])
        num_other = int(num_tokens.sum() - num_tokens[requests].sum())
        if self.ranks_nodes:
            # A prompt that is read in chunks says nothing yet.
            known = inputs.num_computed_tokens_cpu[: len(num_tokens)] + num_tokens
            says = known >= inputs.num_tokens_no_spec[: len(num_tokens)]
            self.forest.cut(tree, chances, int(says.sum()), num_other)
        flat = lay_out(tree, batch, requests, num_tokens, runner.max_model_len)
        num_logits = np.diff(flat.logits_start)[requests].tolist()
        for b, nodes in enumerate(tree.num_nodes.tolist()):
            scheduled[ids[b]] = nodes
            # vLLM counts a request's logits rows by its drafts.
            placeholders[ids[b]] = [0] * (num_logits[b] - 1)
        output.total_num_scheduled_tokens = int(flat.start[-1])
        return StepTrees(ids, requests, batch, tree, flat, chances)

    def draft_ahead(self, runner: Any, pages: BlockPages) -> dict[str, list[int]]:
        """Chains of the requests with a grammar, at the end of a step."""
        inputs = runner.input_batch
        still_read = runner.discard_request_mask.np  # whose prompt is
        wanted = {
            r: self.sizes[r].max_tree_size
            for i, r in enumerate(inputs.req_ids)
            if r in self.grammars and not still_read[i]
        }
        if not wanted:
            return {}
        position = inputs.num_tokens_no_spec - 1
        ids, table = self._wanted(wanted, inputs, position)
        _, tree, _ = self._grow(runner, pages, ids, table)
        return dict(zip(ids, tree.chains(), strict=True))

    def _grow(
        self, runner: Any, pages: BlockPages, ids: list[str], table: np.ndarray
    ) -> tuple[RequestBatch, DraftTree, torch.Tensor]:
        """Trees of some requests, as `_wanted` gives them, and their nodes' chances."""
        inputs = runner.input_batch
        plain = needs_plain_rows(inputs.sampling_metadata)
        w, n, g, max_nodes = size_trees(table, runner.max_model_len, plain)
        # Contiguous, for kernels are compiled by layout.
        requests, position = table[:, INDEX].copy(), table[:, POSITION]
        # The tree's own slots included: accepted nodes move out of them.
        num_blocks = -(-int((position + max_nodes).max()) // pages.block_size)
        blocks = inputs.block_table[runner.page_group].block_table
        block_table = blocks.np[requests, :num_blocks]
        root = inputs.token_ids_cpu[requests, position]
        columns = block_table, position.astype(np.int32), root, w, n, g, max_nodes
        batch = RequestBatch(*map(torch.from_numpy, columns))
        batch.block_table = kept_blocks(
            batch.block_table, batch.position, runner.page_kept, pages.block_size
        )
        hints = Hints(
            self.bigrams,
            self.bigram_logprobs,
            *upcoming_noise(runner, requests, self.server.ngram_size - 1),
            cpu_noise,
            self.forest.least if self.ranks_nodes else 0.0,
        )
        most = self.server.verification_set_size
        known, tables = batch, None
        if self.corpus:
            known, hints.before = self.corpus.behind_others(batch, ids)
        else:
            tables = self.tables
            tables.choose(ids, pages, num_blocks)
        tree, chances = self.ops.draft(pages, known, hints, most, tables=tables)
        return batch, tree, chances

    def _follow(
        self,
        paths: dict[str, tuple[int, list[int]]],
        ids: list[str],
        batch: RequestBatch,
        tree: DraftTree,
        chances: torch.Tensor,
    ) -> DraftTree:
        """The trees, those of requests with a path along it, and to be fed whole."""
        rows = torch.tensor([b for b, r in enumerate(ids) if r in paths])
        chains = DraftTree(*(column[rows] for column in vars(tree).values()))
        followed = follow(
            chains,
            batch.position[rows],
            batch.root[rows],
            torch.minimum(batch.max_nodes, batch.ngram_size)[rows, None],
            Paths.of([paths[ids[b]] for b in rows.tolist()], "cpu"),
        )
        for column, values in zip(
            vars(tree).values(), vars(followed).values(), strict=True
        ):
            column[rows] = values
        chances[rows] = 0.0  # the scheduler counts on all of them
        return tree

    def _wanted(
        self, wanted: Mapping[str, int], inputs: Any, position: np.ndarray
    ) -> tuple[list[str], np.ndarray]:
        """The requests that are to draft, and the table of them `size_trees` takes.

        Args:
            wanted: request id -> most nodes of its tree.
            inputs: the runner's batch.
            position: [i], p of each request of the batch.
        """
        ids, table = [], []
        for i, request_id in enumerate(inputs.req_ids):
            if request_id in wanted:
                own = self.sizes[request_id]
                sizes = own.fed_window_size, own.ngram_size, own.verification_set_size
                ids.append(request_id)
                table.append((i, position[i], *sizes, wanted[request_id]))
        return ids, np.array(table, dtype=np.int64)
