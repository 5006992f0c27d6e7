# SPDX-License-Identifier: Apache-2.0
"""The narrow side of lookahead: the scheduler sees N-1 drafts per request.

It never sees the tokens of a tree, but says how many nodes it may have. It marks each
request that drafts with N-1 placeholders, which the worker expands into T nodes, and
leaves them room: input tokens and K/V slots. Metrics and rollback are then vLLM's own.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_lookahead.engine.corpus import given_out
from vllm_lookahead.engine.outputs import LookaheadSchedulerOutput
from vllm_lookahead.engine.shares import nodes_within, tree_budget, tree_share
from vllm_lookahead.engine.support import V2_WORKER
from vllm_lookahead.params import LookaheadParams, request_params

if TYPE_CHECKING:
    from vllm_lookahead.engine.config import LookaheadConfig

PLACEHOLDER = -1


class TreeRoom(NamedTuple):
    """What a request's tree may take in the next step.

    Attributes:
        whole: T of the request.
        verified: the root and the candidates among them.
        scheduled: the root and the placeholders.
        nodes: that the tree may have.
    """

    whole: int
    verified: int
    scheduled: int
    nodes: int


class LookaheadScheduler(Scheduler):
    """vLLM's scheduler with room for draft trees, and a switch per request."""

    max_num_scheduled_tokens: int

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Self:
        # `EngineArgs` names the class before vLLM settles async scheduling.
        if cls is LookaheadScheduler and vllm_config.scheduler_config.async_scheduling:
            return super().__new__(LookaheadAsyncScheduler)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: LookaheadConfig = self.vllm_config.speculative_config
        self.lookahead = config.params
        # vLLM takes from this table how many drafts a batch of each size gets: always
        # N-1. Without one it would pad every request that enters with a single token
        # left to N tokens, also where lookahead is off.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (
            self.max_num_running_reqs + 1
        )
        widest = self.lookahead.max_tree_size
        self.full_sizes = widest, 1 + self.lookahead.max_candidate_nodes
        self.input_tokens = self.scheduler_config.max_num_batched_tokens
        self.token_limit = self.max_num_scheduled_tokens
        # Only the GPU engine's trees share a step's tokens.
        worker = self.vllm_config.parallel_config.worker_cls
        self.trees_share = worker == V2_WORKER
        self.rooms: dict[str, TreeRoom] = {}  # of the next step, by request id
        manager: Any = self.kv_cache_manager
        self._allocate_slots = manager.allocate_slots
        manager.allocate_slots = self.allocate_slots

    def params(self, request: Request) -> LookaheadParams | None:
        """The sizes that a request drafts with; None if it does not draft."""
        sampling = request.sampling_params
        # A grammar is checked along one chain, token by token: it runs plain.
        if sampling is None or request.use_structured_output:
            return None
        return request_params(sampling.extra_args, self.lookahead)

    def tree_sizes(self, request: Request) -> tuple[int, int]:
        """T of a request that drafts, and the root with the candidates among it."""
        params = self.params(request) or self.lookahead
        if params is self.lookahead:
            return self.full_sizes
        return params.max_tree_size, 1 + params.max_candidate_nodes

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.make_room()
        output = super().schedule(*args, **kwargs)
        shared = given_out(output, self.requests, self.lookahead, self.block_size)
        return LookaheadSchedulerOutput(
            **vars(output), max_nodes=self.max_nodes(output), given_out=shared
        )

    def make_room(self) -> None:
        """Size the trees of the next step, and keep input tokens for their nodes.

        Trees keep their size when a prefill shares the step, unless they would take
        more than half of what it could have.
        """
        drafting = [r for r in self.running if r.spec_token_ids]
        sizes = [self.tree_sizes(request) for request in drafting]
        most, _ = self.full_sizes
        if drafting and self.trees_share:
            budget = tree_budget(most, self.input_tokens)
            most = tree_share([tree for tree, _ in sizes], budget)
        self.rooms.clear()
        free, wanted = self.input_tokens, 0
        for request, (tree, verified) in zip(drafting, sizes, strict=True):
            nodes = nodes_within(tree, verified, most)
            # No more than its nodes can be accepted.
            if len(request.spec_token_ids) >= nodes:
                request.spec_token_ids = request.spec_token_ids[: nodes - 1]
            scheduled = 1 + len(request.spec_token_ids)
            room = TreeRoom(tree, verified, scheduled, nodes)
            self.rooms[request.request_id] = room
            free -= scheduled
            wanted += nodes - scheduled
        kept = min(wanted, max(0, free) // 2)
        self.max_num_scheduled_tokens = min(self.token_limit, self.input_tokens - kept)

    def max_nodes(self, output: SchedulerOutput) -> dict[str, int]:
        """Nodes of each tree of a step, as many as there are input tokens left for."""
        spare = self.input_tokens - output.total_num_scheduled_tokens
        drafting = output.scheduled_spec_decode_tokens
        fed: dict[str, int] = {}
        for request_id, placeholders in drafting.items():
            scheduled, room = 1 + len(placeholders), self.rooms.get(request_id)
            if room is None:  # vLLM gave placeholders to a request that enters
                sizes = self.tree_sizes(self.requests[request_id])
                room = TreeRoom(*sizes, scheduled, scheduled)
            share = spare // (len(drafting) - len(fed))
            # Where fewer than N tokens may come out, vLLM cut the placeholders. A tree
            # of as many nodes is no deeper than that.
            most = scheduled
            if scheduled == room.scheduled:
                most = min(room.nodes, scheduled + share)
            fed[request_id] = nodes_within(room.whole, room.verified, most)
            spare -= max(0, fed[request_id] - scheduled)
        return fed

    def allocate_slots(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with K/V slots for the request's tree if this step feeds it one.

        No request is preempted for what another's tree would hold beside its
        placeholders.
        """
        room = self.rooms.get(request.request_id)
        extra = room.nodes - room.scheduled if room else 0
        kwargs["num_lookahead_tokens"] = extra
        slots = self._allocate_slots(request, *args, **kwargs)
        if slots is None and room and extra:
            kwargs["num_lookahead_tokens"] = 0
            slots = self._allocate_slots(request, *args, **kwargs)
            if slots is not None:
                narrow = room._replace(nodes=room.scheduled)
                self.rooms[request.request_id] = narrow
        return slots

    def num_drafts(self, request: Request) -> int:
        """Draft tokens to schedule for a request: N-1, or 0 when it is off."""
        params = self.params(request)
        return params.ngram_size - 1 if params else 0

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if not request.is_prefill_chunk:
                request.spec_token_ids = [PLACEHOLDER] * self.num_drafts(request)

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        drafted = getattr(model_runner_output, "num_draft_tokens", None)
        if drafted is not None:
            placeholders = scheduler_output.scheduled_spec_decode_tokens
            scheduler_output.num_invalid_spec_tokens = {
                request_id: len(tokens) - drafted.get(request_id, 0)
                for request_id, tokens in placeholders.items()
            }
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
        if num_draft_tokens == invalid:  # nothing was drafted
            return spec_decoding_stats
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )


class LookaheadAsyncScheduler(LookaheadScheduler, AsyncScheduler):
    """Two steps in flight: the worker knows which drafts the placeholders are."""
