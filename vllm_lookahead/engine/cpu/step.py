# SPDX-License-Identifier: Apache-2.0
"""One step's trees, laid out in the V1 runner's flat batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import CANDIDATE, WINDOW, DraftTree
from vllm_lookahead.engine.cpu.attention import TreeRows

if TYPE_CHECKING:
    from vllm_lookahead.engine.cpu.runner import LookaheadCPUModelRunner


@dataclass
class TreeStep:
    """The trees of a step. Index b runs over them, index i over all requests.

    Attributes:
        request_ids: [b] their requests.
        rows: [b] int64, i of each.
        batch, tree: the core's view of them.
        start: [i + 1] int64, first token of each request in the flat batch.
        logits_start: [i + 1] int64, first logits row of each request.
        logits_indices: [rows] int64, flat token of each logits row: of a tree, the
            root, the candidates and the window's last row; else the last token.
        logits_node: [b, T] int64, logits row of each node, -1 without logits.
        is_final: [tokens] bool, the token's K/V is final once computed: all but
            the nodes after a root.
        num_emitted: tokens that the trees gained, once sampled.
    """

    request_ids: list[str]
    rows: np.ndarray
    batch: RequestBatch
    tree: DraftTree
    start: np.ndarray
    logits_start: np.ndarray
    logits_indices: torch.Tensor
    logits_node: np.ndarray
    is_final: torch.Tensor
    num_emitted: int = 0

    @property
    def num_tokens(self) -> int:
        return int(self.start[-1])

    @property
    def only_decodes(self) -> bool:
        """Whether the step fed these trees and nothing else."""
        return len(self.rows) == len(self.start) - 1

    @classmethod
    def propose(
        cls, runner: "LookaheadCPUModelRunner", output: SchedulerOutput
    ) -> "TreeStep":
        """Draft for every request with placeholders, and widen `output` to match."""
        inputs = runner.input_batch
        placeholders = output.scheduled_spec_decode_tokens
        ids = [r for r in inputs.req_ids if r in placeholders]
        rows = np.array([inputs.req_id_to_index[r] for r in ids])
        params = [runner.request_params[r] for r in ids]
        position = inputs.num_computed_tokens_cpu[rows]
        narrow = np.array([1 + len(placeholders[r]) for r in ids])

        # At most: the slots reserved, the model's length, and the input buffers.
        reserved = runner.params.max_tree_size - runner.params.ngram_size
        room = runner.max_model_len - position
        spare = runner.max_num_tokens - output.total_num_scheduled_tokens
        max_nodes = np.minimum(narrow + max(0, reserved), room)
        max_nodes = np.minimum(max_nodes, narrow + max(0, spare) // len(ids))
        sizes = np.array(
            [(p.window_size, p.ngram_size, p.verification_set_size) for p in params]
        )
        # A token may be emitted at every position up to max_model_len - 1.
        sizes[:, 1] = np.minimum(sizes[:, 1], room - 1)
        # Fewer placeholders than N-1: no more tokens may come out than those and one.
        is_cut = narrow < sizes[:, 1]
        max_nodes = np.where(is_cut, np.minimum(max_nodes, narrow), max_nodes)
        max_nodes = np.where(sizes[:, 1] < 2, 1, max_nodes)
        sizes[:, 1] = np.maximum(sizes[:, 1], 2)
        if runner.needs_plain_rows():
            max_nodes[:] = 1

        def column(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))

        table = inputs.block_table[0].block_table.np[rows]
        # The tree's own slots included: accepted nodes move out of them.
        num_blocks = -(-int((position + max_nodes).max()) // runner.pages.block_size)
        batch = RequestBatch(
            block_table=torch.from_numpy(table[:, :num_blocks]),
            position=column(position),
            root=column(inputs.token_ids_cpu[rows, position]),
            window_size=column(sizes[:, 0]),
            ngram_size=column(sizes[:, 1]),
            verification_set_size=column(sizes[:, 2]),
            max_nodes=column(max_nodes),
        )
        tree = runner.ops.propose(
            runner.pages, batch, runner.policy.chain_length, runner.bigrams
        )
        return cls._lay_out(runner, output, ids, rows, batch, tree)

    @classmethod
    def _lay_out(
        cls,
        runner: "LookaheadCPUModelRunner",
        output: SchedulerOutput,
        ids: list[str],
        rows: np.ndarray,
        batch: RequestBatch,
        tree: DraftTree,
    ) -> "TreeStep":
        inputs = runner.input_batch
        num_nodes = tree.num_nodes.numpy()
        kinds = tree.kinds.numpy()
        node = np.arange(kinds.shape[1])

        # Which nodes need logits: the window's last row is N_r-2 deep and beyond.
        width = batch.window_size.numpy()[:, None]
        last_row = num_nodes[:, None] - width
        in_last_row = (kinds == WINDOW) & (node >= last_row)
        wanted = (node == 0) | (kinds == CANDIDATE) | in_last_row
        wanted &= node < num_nodes[:, None]

        num_tokens = np.array([output.num_scheduled_tokens[r] for r in inputs.req_ids])
        num_tokens[rows] = num_nodes
        num_logits = np.ones(len(num_tokens), dtype=np.int64)
        num_logits[rows] = wanted.sum(1)
        start = np.concatenate([[0], num_tokens.cumsum()])
        logits_start = np.concatenate([[0], num_logits.cumsum()])

        logits_indices = np.repeat(start[1:] - 1, num_logits)
        order = wanted.cumsum(1) - 1
        logits_node = np.where(wanted, logits_start[rows, None] + order, -1)
        flat = start[rows, None] + node
        logits_indices[logits_node[wanted]] = flat[wanted]

        is_final = np.ones(start[-1], dtype=bool)
        is_final[flat[(node > 0) & (node < num_nodes[:, None])]] = False

        for b, request_id in enumerate(ids):
            output.num_scheduled_tokens[request_id] = int(num_nodes[b])
            # vLLM counts a request's logits rows by its drafts.
            drafts = int(num_logits[rows[b]]) - 1
            output.scheduled_spec_decode_tokens[request_id] = [0] * drafts
        output.total_num_scheduled_tokens = int(start[-1])
        return cls(
            ids,
            rows,
            batch,
            tree,
            start,
            logits_start,
            torch.from_numpy(logits_indices),
            logits_node,
            torch.from_numpy(is_final),
        )

    def feed(self, runner: "LookaheadCPUModelRunner") -> None:
        """Put the trees' tokens and RoPE positions into the input buffers."""
        size = self.tree.tokens.shape[1]
        node = np.arange(size)
        live = node < self.tree.num_nodes.numpy()[:, None]
        flat = (self.start[self.rows, None] + node)[live]
        position = self.batch.position.numpy()[:, None] + self.tree.depths.numpy()
        # A window may reach past the model's length; its tokens are hints.
        position = np.minimum(position, runner.max_model_len - 1)
        runner.input_ids.np[flat] = self.tree.tokens.numpy()[live]
        runner.positions.numpy()[flat] = position[live]

    def tree_rows(self, runner: "LookaheadCPUModelRunner") -> list[TreeRows]:
        """The trees that branch, for attention."""
        parents = self.tree.parents.numpy()
        num_nodes = self.tree.num_nodes.numpy()
        node = np.arange(parents.shape[1])
        chain = ((parents == node - 1) | (node >= num_nodes[:, None])).all(1)
        if chain.all():
            return []
        mask = torch.empty(*parents.shape, parents.shape[1])
        runner.ops.fill_mask(self.tree, mask)
        group = runner.model_config.get_num_attention_heads(
            runner.parallel_config
        ) // runner.model_config.get_num_kv_heads(runner.parallel_config)
        trees = []
        for b in np.nonzero(~chain)[0]:
            size = int(num_nodes[b])
            length = int(self.batch.position[b]) + size
            first = int(self.start[self.rows[b]])
            num_blocks = -(-length // runner.pages.block_size)
            table = runner.input_batch.block_table[0].block_table.cpu[self.rows[b]]
            trees.append(
                TreeRows(
                    slice(first, first + size),
                    table[:num_blocks].long(),
                    length,
                    mask[b, :size, :size].repeat(group, 1),
                )
            )
        return trees

    def num_draft_tokens(self) -> dict[str, int]:
        """Longest candidate of each request: what vLLM's metrics call its drafts."""
        is_candidate = self.tree.kinds == CANDIDATE
        longest = (self.tree.depths * is_candidate).amax(1).tolist()
        return dict(zip(self.request_ids, longest, strict=True))
