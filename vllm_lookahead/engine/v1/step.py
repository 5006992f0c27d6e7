# SPDX-License-Identifier: Apache-2.0
"""One step's trees, laid out in the V1 runner's flat batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.best_first import Hints, Rejected
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.engine.outputs import LookaheadSchedulerOutput
from vllm_lookahead.engine.v1.sampling import upcoming_noise
from vllm_lookahead.numba_kernels.attention import TreeRows
from vllm_lookahead.numba_kernels.layout import (
    NARROW,
    POSITION,
    ROW,
    FlatTrees,
    feed_trees,
    lay_out,
    size_trees,
)

if TYPE_CHECKING:
    from vllm_lookahead.engine.v1.model_runner import LookaheadCPUModelRunner


@dataclass
class TreeStep:
    """The trees of a step. Index b runs over them, index i over all requests.

    Attributes:
        request_ids: [b] their requests.
        rows: [b] int64, i of each.
        batch, tree: the core's view of them.
        flat: where they lie in the runner's batch.
        promised: drafts that will be accepted, going by their chances.
        verdict: of the trees, once sampled.
        rejected: of their nodes, once sampled.
    """

    request_ids: list[str]
    rows: np.ndarray
    batch: RequestBatch
    tree: DraftTree
    flat: FlatTrees
    promised: float
    verdict: Verdict | None = None
    rejected: Rejected | None = None

    @property
    def num_requests(self) -> int:
        """Of the whole step."""
        return len(self.flat.start) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.flat.start[-1])

    @property
    def only_decodes(self) -> bool:
        """Whether the step fed these trees and nothing else."""
        return len(self.rows) == self.num_requests

    @classmethod
    def propose(
        cls, runner: "LookaheadCPUModelRunner", output: LookaheadSchedulerOutput
    ) -> "TreeStep":
        """Draft for every request with placeholders, and widen `output` to match."""
        inputs, params = runner.input_batch, runner.params
        placeholders = output.scheduled_spec_decode_tokens
        num_computed = inputs.num_computed_tokens_cpu
        ids, requests = [], []
        for i, request_id in enumerate(inputs.req_ids):
            if request_id in placeholders:
                own = runner.request_params[request_id]
                narrow = 1 + len(placeholders[request_id])
                sizes = own.window_size, own.ngram_size, own.verification_set_size
                ids.append(request_id)
                requests.append((i, narrow, num_computed[i], *sizes))
        table = np.array(requests, dtype=np.int64)
        w, n, g, max_nodes = size_trees(
            table,
            max(0, params.max_tree_size - params.ngram_size),
            runner.max_model_len,
            max(0, runner.max_num_tokens - output.total_num_scheduled_tokens),
            runner.needs_plain_rows(),
        )
        cramped = [request_id in output.cramped for request_id in ids]
        max_nodes[cramped] = np.minimum(max_nodes, table[:, NARROW])[cramped]
        # Contiguous, for kernels are compiled by layout.
        rows, position = table[:, ROW].copy(), table[:, POSITION]
        # The tree's own slots included: accepted nodes move out of them.
        num_blocks = -(-int((position + max_nodes).max()) // runner.pages.block_size)
        block_table = inputs.block_table[0].block_table.np[rows, :num_blocks]
        root = inputs.token_ids_cpu[rows, position]
        columns = block_table, position.astype(np.int32), root, w, n, g, max_nodes
        batch = RequestBatch(*map(torch.from_numpy, columns))
        hints = Hints(
            runner.bigrams,
            runner.bigram_logits,
            *upcoming_noise(runner, rows),
            rejected_nodes(runner.last_step, ids),
        )
        least = float(runner.policy.least)
        tree, expected = runner.ops.grow(runner.pages, batch, hints, least)

        scheduled = output.num_scheduled_tokens
        num_tokens = np.array([scheduled[r] for r in inputs.req_ids])
        flat = lay_out(tree, batch, rows, num_tokens, runner.max_model_len)
        num_logits = np.diff(flat.logits_start)[rows].tolist()
        for b, nodes in enumerate(tree.num_nodes.tolist()):
            scheduled[ids[b]] = nodes
            # vLLM counts a request's logits rows by its drafts.
            placeholders[ids[b]] = [0] * (num_logits[b] - 1)
        output.total_num_scheduled_tokens = int(flat.start[-1])
        return cls(ids, rows, batch, tree, flat, float(expected.sum()))

    def feed(self, runner: "LookaheadCPUModelRunner") -> None:
        """Put the trees' tokens and RoPE positions into the input buffers."""
        at, tokens, position = self.flat.fed
        runner.input_ids.np[at] = tokens
        runner.positions.numpy()[at] = position
        # With `enable_prompt_embeds` vLLM embeds the rows marked so, here N of a tree.
        runner.is_token_ids.np[at] = True

    def feed_alone(self, runner: "LookaheadCPUModelRunner") -> torch.Tensor:
        """What vLLM's `_prepare_inputs` does, where the step has only these trees.

        Of the runner's buffers those are left as they were that nothing else reads on
        a CPU: `req_indices`, `query_pos`, `num_scheduled_tokens`, `is_token_ids`,
        `prev_positions`, and the device's `num_computed_tokens` and
        `num_accepted_tokens`.

        Returns:
            [b] int64, slots of the roots.
        """
        root_slots = feed_trees(
            self.flat.fed,
            self.flat.start,
            self.batch.position.numpy(),
            self.batch.block_table.numpy(),
            runner.pages.block_size,
            runner.input_ids.np,
            runner.positions.numpy(),
            runner.input_batch.block_table[0].slot_mapping.np,
            runner.query_start_loc.np,
            runner.seq_lens.numpy(),
            runner.optimistic_seq_lens_cpu.numpy(),
        )
        runner.discard_request_mask.np[: self.num_requests] = False
        return torch.from_numpy(root_slots)

    def attention_inputs(
        self, runner: "LookaheadCPUModelRunner"
    ) -> CommonAttentionMetadata:
        """Once fed alone."""
        n, table = self.num_requests, runner.input_batch.block_table[0]
        starts = runner.query_start_loc.cpu[: n + 1]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=runner.seq_lens[:n],
            num_reqs=n,
            num_actual_tokens=self.num_tokens,
            max_query_len=int(self.tree.num_nodes.numpy().max()),
            max_seq_len=int(runner.seq_lens.numpy().max()),
            block_table_tensor=table.block_table.cpu[:n],
            slot_mapping=table.slot_mapping.cpu[: self.num_tokens],
        )

    def tree_rows(self, runner: "LookaheadCPUModelRunner") -> TreeRows | None:
        """The trees for attention, None where causal order will do."""
        if self.flat.is_chain.all():
            return None
        return TreeRows(
            self.flat.start[self.rows],
            self.tree.num_nodes.numpy(),
            self.batch.position.numpy(),
            self.batch.block_table.numpy(),
            runner.ops.ancestors(self.tree),
            self.tree.depths.numpy(),
            self.only_decodes,
        )

    def finish(self, logits: torch.Tensor, verdict: Verdict) -> None:
        """
        Args:
            logits: [rows, vocab_size], laid out as `flat.logits_indices`.
            verdict: what was accepted.
        """
        self.verdict = verdict
        row_of_node = torch.from_numpy(self.flat.logits_node)
        self.rejected = Rejected.of(self.tree, verdict.num_emitted, row_of_node, logits)

    def num_draft_tokens(self) -> dict[str, int]:
        """Longest candidate of each request: what vLLM's metrics call its drafts."""
        return dict(zip(self.request_ids, self.flat.longest.tolist(), strict=True))


def rejected_nodes(step: TreeStep | None, request_ids: list[str]) -> Rejected:
    """What the last step computed beyond what it accepted.

    Args:
        step: the last one, None if it had no trees.
        request_ids: [B] whose drafts are wanted.
    """
    if step is None or step.rejected is None:
        return Rejected.none(len(request_ids))
    if step.request_ids == request_ids:
        return step.rejected
    places = {request_id: b for b, request_id in enumerate(step.request_ids)}
    at = torch.tensor([places.get(request_id, -1) for request_id in request_ids])
    nodes = step.rejected
    tokens = nodes.tokens[at].masked_fill(at[:, None] < 0, EMPTY)
    return Rejected(tokens, nodes.depths[at], nodes.rows[at], nodes.logits)
