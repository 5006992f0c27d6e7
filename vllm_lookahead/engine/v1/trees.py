# SPDX-License-Identifier: Apache-2.0
"""The draft trees of a step, laid out in the V1 runner's flat batch."""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.numba_kernels.answers import likeliest_tokens
from vllm_lookahead.numba_kernels.attention import TreeRows
from vllm_lookahead.numba_kernels.layout import FlatTrees, feed_trees
from vllm_lookahead.numba_kernels.mask import ancestors


@dataclass
class StepTrees:
    """Index b runs over the trees, index i over all requests of the step.

    Attributes:
        request_ids: [b] their requests.
        requests: [b] int64, i of each.
        batch, tree: the core's view of them.
        flat: where they lie in the runner's batch.
        chances: [b, T] float32 of the candidates, 0 elsewhere.
        verdict: of the trees, once sampled.
    """

    request_ids: list[str]
    requests: np.ndarray
    batch: RequestBatch
    tree: DraftTree
    flat: FlatTrees
    chances: torch.Tensor
    verdict: Verdict | None = None

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
        return len(self.requests) == self.num_requests

    def feed(self, inputs: CPUModelRunner) -> None:
        """Put the trees' tokens and RoPE positions into the runner's input buffers."""
        at, tokens, position = self.flat.fed
        inputs.input_ids.np[at] = tokens
        inputs.positions.numpy()[at] = position
        # With `enable_prompt_embeds` vLLM embeds what is marked so; it marked N a tree.
        inputs.is_token_ids.np[at] = True

    def feed_alone(self, inputs: CPUModelRunner, block_size: int) -> torch.Tensor:
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
            block_size,
            inputs.input_ids.np,
            inputs.positions.numpy(),
            inputs.input_batch.block_table[0].slot_mapping.np,
            inputs.query_start_loc.np,
            inputs.seq_lens.numpy(),
            inputs.optimistic_seq_lens_cpu.numpy(),
        )
        inputs.discard_request_mask.np[: self.num_requests] = False
        return torch.from_numpy(root_slots)

    def attention_inputs(self, inputs: CPUModelRunner) -> CommonAttentionMetadata:
        """What backends make their metadata of, once fed alone."""
        n, table = self.num_requests, inputs.input_batch.block_table[0]
        starts = inputs.query_start_loc.cpu[: n + 1]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=inputs.seq_lens[:n],
            num_reqs=n,
            num_actual_tokens=self.num_tokens,
            max_query_len=int(self.tree.num_nodes.numpy().max()),
            max_seq_len=int(inputs.seq_lens.numpy().max()),
            block_table_tensor=table.block_table.cpu[:n],
            slot_mapping=table.slot_mapping.cpu[: self.num_tokens],
        )

    def branched(self) -> TreeRows | None:
        """The trees for attention, None where causal order will do."""
        if self.flat.is_chain.all():
            return None
        return TreeRows(
            self.flat.start[self.requests],
            self.tree.num_nodes.numpy(),
            self.batch.position.numpy(),
            self.batch.block_table.numpy(),
            ancestors(self.tree),
            self.tree.depths.numpy(),
            self.only_decodes,
        )

    def answers(self, logits: torch.Tensor) -> Answers:
        """What the model says after each node.

        Args:
            logits: [rows, vocab_size], laid out as `flat.logits_indices`.
        """
        first_row = torch.from_numpy(self.flat.logits_start[self.requests])
        return Answers(*likeliest_tokens(logits), first_row.int())

    def chains(self, wanted: Set[str]) -> dict[str, list[int]]:
        """The drafts of some requests, whose trees are chains."""
        chains = zip(self.request_ids, self.tree.chains(), strict=True)
        return {request_id: c for request_id, c in chains if request_id in wanted}

    def num_draft_tokens(self) -> dict[str, int]:
        """Longest candidate of each request: what vLLM's metrics call its drafts."""
        return dict(zip(self.request_ids, self.flat.longest.tolist(), strict=True))
