# SPDX-License-Identifier: Apache-2.0
"""Draft for a step: gather what is known, size the trees, grow them, lay them out."""

import time
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.draft.price import DraftSizePolicy
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.outputs import LookaheadSchedulerOutput
from vllm_lookahead.engine.v1.sampling import needs_plain_rows, upcoming_noise
from vllm_lookahead.engine.v1.trees import StepTrees
from vllm_lookahead.numba_kernels.layout import (
    INDEX,
    POSITION,
    lay_out,
    size_trees,
)
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.params import LookaheadParams, request_params


class TreeDrafter:
    """What drafts are made of, and what they may cost.

    Attributes:
        server: the sizes that the server was started with, the most of each.
        sizes: those of each request that drafts.
        bigrams: [V, R] int32, see `core.draft.bigrams`; V is 0 before the model was
            asked.
        bigram_logprobs: [V, R] float32 of them.
        policy: how likely a node must be to be worth its time.
        corpus: other requests' blocks, if they are drafted from.
    """

    def __init__(self, server: LookaheadParams, ops: NumbaOps) -> None:
        self.server, self.ops = server, ops
        self.sizes: dict[str, LookaheadParams] = {}
        self.bigrams = torch.zeros(0, 0, dtype=torch.int32)
        self.bigram_logprobs = torch.zeros(0, 0)
        self.policy = DraftSizePolicy()
        self.corpus: Corpus | None = None
        self._step_start = time.perf_counter()

    def add_request(self, request_id: str, sampling: SamplingParams | None) -> None:
        sizes = request_params(sampling and sampling.extra_args, self.server)
        if sizes is not None:
            self.sizes[request_id] = sizes

    def remove_request(self, request_id: str) -> None:
        self.sizes.pop(request_id, None)

    def start_step(self, last: StepTrees | None) -> None:
        """Learn from the step that ends now what a node costs, if it had trees only."""
        now, start = time.perf_counter(), self._step_start
        self._step_start = now
        if last is None or last.verdict is None or not last.only_decodes:
            return
        has_learned = self.policy.observe_step(
            now - start,
            last.num_requests,
            last.num_tokens,
            int(last.verdict.num_emitted.sum()),
            last.promised,
        )
        if has_learned and get_tp_group().world_size > 1:
            # Every rank must draft the same, and each has a clock of its own.
            get_tp_group().broadcast(self.policy.least)

    def draft(
        self,
        runner: CPUModelRunner,
        output: LookaheadSchedulerOutput,
        pages: BlockPages,
    ) -> StepTrees:
        """Draft for every request with placeholders, and widen `output` to match.

        Args:
            runner: vLLM's, between two steps.
            output: the scheduler's, of the step to come.
            pages: what is known of the requests' texts.
        """
        inputs = runner.input_batch
        ids, table = self._wanted(output, inputs)
        plain = needs_plain_rows(inputs.sampling_metadata)
        w, n, g, max_nodes = size_trees(table, runner.max_model_len, plain)
        # Contiguous, for kernels are compiled by layout.
        requests, position = table[:, INDEX].copy(), table[:, POSITION]
        # The tree's own slots included: accepted nodes move out of them.
        num_blocks = -(-int((position + max_nodes).max()) // pages.block_size)
        block_table = inputs.block_table[0].block_table.np[requests, :num_blocks]
        root = inputs.token_ids_cpu[requests, position]
        columns = block_table, position.astype(np.int32), root, w, n, g, max_nodes
        batch = RequestBatch(*map(torch.from_numpy, columns))
        hints = Hints(
            self.bigrams,
            self.bigram_logprobs,
            *upcoming_noise(runner, requests, self.server.ngram_size - 1),
            cpu_noise,
            float(self.policy.least),
        )
        most, known = self.server.verification_set_size, batch
        if self.corpus:
            known, hints.before = self.corpus.behind_others(batch, ids)
        tree, chances = self.ops.draft(pages, known, hints, most)

        scheduled = output.num_scheduled_tokens
        placeholders = output.scheduled_spec_decode_tokens
        num_tokens = np.array([scheduled[r] for r in inputs.req_ids])
        flat = lay_out(tree, batch, requests, num_tokens, runner.max_model_len)
        num_logits = np.diff(flat.logits_start)[requests].tolist()
        for b, nodes in enumerate(tree.num_nodes.tolist()):
            scheduled[ids[b]] = nodes
            # vLLM counts a request's logits rows by its drafts.
            placeholders[ids[b]] = [0] * (num_logits[b] - 1)
        output.total_num_scheduled_tokens = int(flat.start[-1])
        return StepTrees(ids, requests, batch, tree, flat, float(chances.sum()))

    def _wanted(
        self, output: LookaheadSchedulerOutput, inputs: Any
    ) -> tuple[list[str], np.ndarray]:
        """The requests with placeholders, and the table of them `size_trees` takes."""
        placeholders = output.scheduled_spec_decode_tokens
        num_computed = inputs.num_computed_tokens_cpu
        ids, table = [], []
        for i, request_id in enumerate(inputs.req_ids):
            if request_id in placeholders:
                own = self.sizes[request_id]
                sizes = own.fed_window_size, own.ngram_size, own.verification_set_size
                ids.append(request_id)
                most = output.max_nodes[request_id]
                table.append((i, num_computed[i], *sizes, most))
        return ids, np.array(table, dtype=np.int64)
