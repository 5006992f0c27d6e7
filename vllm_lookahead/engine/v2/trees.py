# SPDX-License-Identifier: Apache-2.0
"""One step's trees, laid out in the V2 runner's flat batch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import triton
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.engine.v2.sizes import NGRAM, TREE, VERIFIED, VERIFY, WINDOW
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.rank import rank_nodes
from vllm_lookahead.triton_kernels.waiting import FedTrees, LogitsRows, feed_trees

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_lookahead.engine.v2.sizes import RequestSizes


class Rows(NamedTuple):
    """As much of an `InputBatch` as a plan is made of."""

    num_reqs: int
    idx_mapping_np: np.ndarray
    num_draft_tokens_per_req: np.ndarray
    num_scheduled_tokens: np.ndarray


@dataclass
class Plan:
    """What the host knows of a step; one copy brings it to the device.

    Attributes:
        num_requests, num_trees: B requests, the first D of which are fed trees.
        drafts: whether any of the requests may be fed a tree in its next step.
        cu_verified_np, cu_window_np: [B+1] first logits row of each request, of
            those to sample from and of those to refill the window with. Of a step
            whose trees are cut on the device (`rank`), right for all trees together.
        sizes: [4, B] int32, W, N, G and T of each request.
        scheduled: [B] int32, nodes of each tree, or the most of them; tokens of a
            request without one.
        counts: [3, B] int32, nodes fed, verified, and of the window's last row.
        cu_verified, cu_window, cu_fed, cu_requests: [B+1] int32; `cu_window` counts on
            from the verified rows, the last one is 0 to B.
    """

    num_requests: int
    num_trees: int
    drafts: bool
    cu_verified_np: np.ndarray
    cu_window_np: np.ndarray
    sizes: torch.Tensor
    scheduled: torch.Tensor
    counts: torch.Tensor
    cu_verified: torch.Tensor
    cu_window: torch.Tensor
    cu_fed: torch.Tensor
    cu_requests: torch.Tensor

    @classmethod
    def make(
        cls,
        input_batch: "InputBatch | Rows",
        sizes: "RequestSizes",
        device: torch.device,
        even: np.ndarray | None = None,
    ) -> "Plan":
        """What the host knows, on its way to the device.

        Args:
            input_batch: of the step.
            sizes: of each request index.
            device: of the result.
            even: [B], as many tokens of each request as if all trees were alike, where
                they are cut on the device.
        """
        b = input_batch.num_reqs
        drafts = input_batch.num_draft_tokens_per_req
        # vLLM puts those with drafts first.
        d = 0 if drafts is None else int(np.count_nonzero(drafts))
        table = sizes.table[:, input_batch.idx_mapping_np]  # [5, B]
        host = np.zeros(8 * b + 4 * (b + 1), dtype=np.int32)
        columns, sums = host[: 8 * b].reshape(8, b), host[8 * b :].reshape(4, b + 1)
        columns[:4] = table[[WINDOW, NGRAM, VERIFY, TREE]]
        scheduled, fed, verified, window = columns[4:]
        scheduled[:] = input_batch.num_scheduled_tokens
        fed[:], verified[:] = 1, 1
        fed[:d] = (scheduled if even is None else even)[:d]
        verified[:d] = fed[:d]  # of all trees together, where they are cut; no window
        if even is None:
            verified[:d] = np.minimum(fed[:d], table[VERIFIED, :d])
        window[:d] = np.where(fed[:d] == table[TREE, :d], table[WINDOW, :d], 0)
        np.cumsum(verified, out=sums[0, 1:])
        np.cumsum(window, out=sums[1, 1:])
        sums[1] += sums[0, -1]
        np.cumsum(fed, out=sums[2, 1:])
        sums[3] = np.arange(b + 1)
        packed = async_tensor_h2d(host, device=device)
        return cls(
            b,
            d,
            bool((columns[3] > 1).any()),
            sums[0],
            sums[1],
            packed[: 4 * b].view(4, b),
            packed[4 * b : 5 * b],
            packed[5 * b : 8 * b].view(3, b),
            *packed[8 * b :].view(4, b + 1).unbind(0),
        )

    def rank(
        self,
        chances: torch.Tensor,
        idx_mapping: torch.Tensor,
        budget: int,
        query_start_loc: torch.Tensor,
    ) -> None:
        """Cut the trees to the likeliest nodes of them all.

        Args:
            chances: [max_num_reqs, T] float32, of the trees that wait.
            idx_mapping: [B], the index of each request.
            budget: nodes to feed beside the roots.
            query_start_loc: [max_num_reqs+1] int32, out.
        """
        rank_nodes(
            chances,
            idx_mapping,
            self.scheduled,
            self.num_trees,
            budget,
            query_start_loc,
            self.counts,
            self.cu_verified,
            self.cu_fed,
        )

    def batch(
        self, block_table: torch.Tensor, position: torch.Tensor, root: torch.Tensor
    ) -> RequestBatch:
        """The core's view of the first requests, as many as `position` has."""
        n = position.shape[0]
        columns = (column[:n] for column in self.sizes.unbind(0))
        return RequestBatch(block_table[:n], position, root, *columns)


def _tree(columns: torch.Tensor, num_nodes: torch.Tensor) -> DraftTree:
    return DraftTree(*[*columns, num_nodes])


class StepTrees:
    """The current step's trees, in buffers that a CUDA graph may point to.

    Attributes:
        tree: rows [max_num_reqs, T]; the first B are the step's.
        position, root: [max_num_reqs] int32, p and x of each.
        longest: [max_num_reqs] int32, length of each tree's longest candidate.
        bits: [max_num_reqs, T, ceil(T/32)] int32, packed ancestors.
        sampled: [max_num_reqs * T + 1] int64, the model's token after each node;
            the last cell takes what nobody reads.
        final_slot: [max_num_tokens] int64, slots whose K/V the step computes for good;
            -1 for the nodes after a root.
        rows_per_request: most logits rows of a request: the root, the candidates
            and the window's last row.
        max_rows: most logits rows of a step. No tree has more of them than nodes, but
            for the root's second one where N is 2, and the scheduler keeps all nodes
            within a step's tokens; a request without a tree has one.
        attended: how many requests, from the first on, attend as trees: none of a
            step without trees, all of one without prefills.
    """

    def __init__(
        self,
        max_num_reqs: int,
        max_num_tokens: int,
        params: LookaheadParams,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        t = params.max_tree_size
        self.rows_per_request = 1 + params.max_candidate_nodes + params.window_size
        self.max_rows = max_num_reqs + min(
            max_num_tokens, max_num_reqs * (self.rows_per_request - 1)
        )
        max_rows = max(2, self.max_rows)  # two to warm up
        self._columns = zeros(4, max_num_reqs, t)
        self.tree = _tree(self._columns, zeros(max_num_reqs))
        self.position, self.root = zeros(max_num_reqs), zeros(max_num_reqs)
        self.longest = zeros(max_num_reqs)
        self.bits = zeros(max_num_reqs, t, triton.cdiv(t, 32))
        self.sampled = zeros(max_num_reqs * t + 1, dtype=torch.int64)
        self.final_slot = zeros(max_num_tokens, dtype=torch.int64)
        self.row_token = zeros(max_rows, dtype=torch.int64)
        self.row_node = zeros(max_rows, dtype=torch.int64)
        self.row_index = zeros(max_rows, dtype=torch.int64)
        self.row_local = zeros(max_rows)
        self._fed = FedTrees(
            self._columns,
            self.tree.num_nodes,
            self.position,
            self.root,
            self.longest,
            self.final_slot,
        )
        self._logits_rows = LogitsRows(
            self.row_token, self.row_node, self.row_index, self.row_local
        )
        self.attended = 0
        self.plan: Plan = None  # type: ignore[assignment]  # before the first

    @property
    def covers_batch(self) -> bool:
        """Whether no request of the step attends otherwise than as a tree."""
        return self.attended == self.plan.num_requests

    def forget(self) -> None:
        """Make a dummy batch read no tree, nor a context, of the step before."""
        self.attended = 0
        self.position.zero_()

    def trees(self, end: int, first: int = 0) -> DraftTree:
        """The trees of requests first..end-1."""
        columns, num_nodes = self._columns, self.tree.num_nodes
        return _tree(columns[:, first:end], num_nodes[first:end])

    def sampled_tokens(self, end: int, first: int = 0) -> torch.Tensor:
        """[end - first, T] int64."""
        t = self._columns.shape[2]
        return self.sampled[first * t : end * t].view(-1, t)

    def feed(
        self,
        plan: Plan,
        waiting: WaitingTrees,
        input_batch: "InputBatch",
        slot_mapping: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> None:
        """Gather the step's trees and say which rows of the batch need logits.

        Raises:
            ValueError: the trees have more rows than a scheduler's batch can have.
        """
        b, num_tokens = plan.num_requests, input_batch.num_tokens
        if plan.cu_window_np[-1] > self.max_rows:
            raise ValueError(
                f"{plan.cu_window_np[-1]} logits rows, but buffers for {self.max_rows}"
            )
        self.final_slot[:num_tokens].copy_(slot_mapping[:num_tokens])
        feed_trees(
            self._fed,
            self._logits_rows,
            waiting.columns,
            waiting.num_nodes,
            input_batch.idx_mapping,
            input_batch.query_start_loc[: b + 1],
            input_batch.seq_lens[:b],
            input_batch.input_ids,
            last_sampled,
            plan.counts,
            plan.sizes[1],
            plan.cu_verified,
            plan.cu_window,
            plan.num_trees,
        )
        num_rows = int(plan.cu_verified_np[-1])
        input_batch.logits_indices = self.row_token[:num_rows]
        input_batch.expanded_idx_mapping = self.row_index[:num_rows]
        input_batch.expanded_local_pos = self.row_local[:num_rows]
        input_batch.cu_num_logits = plan.cu_verified
        input_batch.cu_num_logits_np = plan.cu_verified_np

    def warm_up(self, waiting: WaitingTrees, drafts: torch.Tensor) -> None:
        """Compile the kernels that put trees away and gather them, before there is one.

        Args:
            waiting: index 0 is overwritten, as the first tree of the step is.
            drafts: [1, N-1] int64, out.
        """
        device = drafts.device
        index = torch.zeros(1, dtype=torch.int64, device=device)
        waiting.store(self.trees(1), waiting.chances[:1], index, drafts)
        one = torch.arange(3, dtype=torch.int32, device=device)
        slots = waiting.chances.shape[0]
        rank_nodes(
            waiting.chances,
            index,
            one[1:2],
            1,
            0,
            torch.zeros(slots + 1, dtype=torch.int32, device=device),
            *(torch.zeros_like(one)[:, None], one[:2].clone(), one[:2].clone()),
        )
        feed_trees(
            self._fed,
            self._logits_rows,
            waiting.columns,
            waiting.num_nodes,
            index,
            one[:2],
            one[1:2],
            one[:1],
            index.expand(waiting.num_nodes.shape[0])[:, None].contiguous(),
            one[1:2].expand(3, 1).contiguous(),
            one[2:],
            one[:2],
            one[1:],
            num_trees=0,
        )
