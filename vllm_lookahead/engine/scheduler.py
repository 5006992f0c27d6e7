# SPDX-License-Identifier: Apache-2.0
"""The narrow side of lookahead: the scheduler sees N-1 drafts per request.

It never sees the tokens of a tree, but says how many nodes it may have. It marks each
request that drafts with N-1 placeholders, which the worker expands into T nodes, and
leaves them room: input tokens and K/V slots. Metrics and rollback are then vLLM's own.

A request with a grammar drafts one chain. vLLM masks the logits behind drafts that it
knows, so the worker tells them: before they are fed, and then what the grammar leaves
no choice about is fed with them; or, of a step that began before the last one was
known, once they are.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats
from vllm.v1.structured_output.utils import strip_speculative_padding

from vllm_lookahead.engine.corpus import given_out
from vllm_lookahead.engine.forced import ForcedTokens
from vllm_lookahead.engine.forest import Forest
from vllm_lookahead.engine.outputs import LookaheadSchedulerOutput
from vllm_lookahead.engine.shares import nodes_within, tree_share
from vllm_lookahead.engine.support import V1_EXECUTOR, V2_WORKER
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
    is_ahead = False  # of the worker, by a step

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
        if not self.scheduler_config.enable_chunked_prefill:
            # Prompts come whole. A CPU widens its batches for them where attention is
            # latent, after vLLM has taken this limit from them.
            self.token_limit = self.input_tokens
        # Only the GPU engine's trees share a step's tokens.
        parallel = self.vllm_config.parallel_config
        self.trees_share = parallel.worker_cls == V2_WORKER
        self.forest: Forest | None = None
        if self.trees_share and config.ranks_nodes and self.lookahead.can_branch:
            limits = self.max_num_running_reqs, self.input_tokens
            self.forest = Forest(*limits, self.lookahead.max_candidate_nodes)
        self.chances = np.zeros(0)  # of the nodes of the next step, falling
        # Whether a step with a grammar begins once its masks are there.
        self.is_held = parallel.distributed_executor_backend == V1_EXECUTOR
        self.rooms: dict[str, TreeRoom] = {}  # of the next step, by request id
        n = self.lookahead.ngram_size
        self.forced = ForcedTokens(self.structured_output_manager, most=n)
        # Of the next step, see `LookaheadSchedulerOutput`.
        self.paths: dict[str, tuple[int, list[int]]] = {}
        manager: Any = self.kv_cache_manager
        self._allocate_slots = manager.allocate_slots
        manager.allocate_slots = self.allocate_slots

    def params(self, request: Request) -> LookaheadParams | None:
        """The sizes that a request drafts with; None if it does not draft."""
        sampling = request.sampling_params
        if sampling is None:
            return None
        params = request_params(sampling.extra_args, self.lookahead)
        # A grammar is checked along one chain, token by token.
        return params.chain if params and request.use_structured_output else params

    def tree_sizes(self, request: Request) -> tuple[int, int]:
        """T of a request that drafts, and the root with the candidates among it."""
        params = self.params(request) or self.lookahead
        if params is self.lookahead:
            return self.full_sizes
        if request.use_structured_output and request.spec_token_ids:
            drafts = len(request.spec_token_ids)
            return 1 + drafts, 1 + drafts
        return params.max_tree_size, 1 + params.max_candidate_nodes

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.make_room()
        output = super().schedule(*args, **kwargs)
        shared = given_out(output, self.requests, self.lookahead, self.block_size)
        most, best = self.share_nodes(output)
        paths, self.paths = self.paths, {}
        return LookaheadSchedulerOutput(
            **vars(output),
            max_nodes=most,
            best_nodes=best,
            paths={
                request_id: paths.get(request_id) or self.path(request_id, drafts)
                for request_id, drafts in output.scheduled_spec_decode_tokens.items()
                if self.requests[request_id].use_structured_output
            },
            given_out=shared,
        )

    def path(self, request_id: str, drafts: list[int]) -> tuple[int, list[int]]:
        """What a request with a grammar goes on with from the tokens known of it.

        Args:
            request_id: the request's.
            drafts: its next tokens as far as they are scheduled; placeholders where
                only the worker knows what it drafts.
        """
        request = self.requests[request_id]
        drafts = strip_speculative_padding(drafts)
        if self.is_ahead and not self.is_held:
            drafts = [*drafts, *self.forced.after(request, drafts)]
        return request.num_tokens, drafts

    def make_room(self) -> None:
        """Size the trees of the next step, and keep input tokens for their nodes.

        Trees keep their size when a prefill shares the step, unless they would take
        more than half of what it could have.
        """
        drafting = [r for r in self.running if r.spec_token_ids]
        sizes = [self.tree_sizes(request) for request in drafting]
        most, _ = self.full_sizes
        wanted, placeholders = None, most
        if drafting and self.forest:
            wanted = self.best_nodes(drafting, sizes)
            most = 1 + wanted
            # vLLM counts placeholders as tokens: prefills have half a step at least.
            placeholders = max(1, self.input_tokens // (2 * len(drafting))) - 1
        elif drafting and self.trees_share:
            most = tree_share([tree for tree, _ in sizes], self.input_tokens)
        self.rooms.clear()
        scheduled = fed = 0
        for request, (tree, verified) in zip(drafting, sizes, strict=True):
            nodes = nodes_within(tree, verified, most)
            # No more than its nodes can be accepted, nor than its placeholders.
            if len(request.spec_token_ids) > placeholders:
                nodes = min(nodes, 1 + placeholders)
            if len(request.spec_token_ids) >= nodes:
                request.spec_token_ids = request.spec_token_ids[: nodes - 1]
            count = 1 + len(request.spec_token_ids)
            self.rooms[request.request_id] = TreeRoom(tree, verified, count, nodes)
            scheduled += count
            fed += nodes
        if wanted is not None:
            fed = min(fed, len(drafting) + wanted)
        free = max(0, self.input_tokens - scheduled)
        kept = min(max(0, fed - scheduled), free // 2)
        self.max_num_scheduled_tokens = min(self.token_limit, self.input_tokens - kept)

    def best_nodes(self, drafting: list[Request], sizes: list[tuple[int, int]]) -> int:
        """Nodes that are worth their time beside the roots, if nothing is prefilled."""
        assert self.forest is not None
        room = self.input_tokens - len(self.running)
        most = [
            (r.request_id, t - 1) for r, (t, _) in zip(drafting, sizes, strict=True)
        ]
        self.chances = self.forest.ranked(most)[: max(0, room)]
        tokens = len(self.running)
        return self.forest.best(self.chances, tokens, tokens)

    def share_nodes(self, output: SchedulerOutput) -> tuple[dict[str, int], int | None]:
        """What the trees of a step may have: here their width is decided.

        Returns:
            Nodes of each, as many as there are K/V slots for; and how many of them are
            fed beside the roots, the likeliest of all: None for all of them.
        """
        drafting = output.scheduled_spec_decode_tokens
        if not self.forest or not drafting:
            return self.max_nodes(output), None
        # New requests have placeholders, too, but no tree.
        drafted = drafting.keys() & self.rooms.keys()
        narrow = sum(len(drafting[name]) for name in drafted)
        most: dict[str, int] = {}
        for name in drafted:
            room, scheduled = self.rooms[name], 1 + len(drafting[name])
            most[name] = room.nodes if scheduled == room.scheduled else scheduled
        total = sum(most.values()) - len(most)
        emitting = sum(
            not self.requests[name].is_prefill_chunk
            for name in output.num_scheduled_tokens
        )
        tokens = output.total_num_scheduled_tokens - narrow
        chances = self.chances[: min(total, self.input_tokens - tokens)]
        best = self.forest.best(chances, tokens, emitting)
        # A LoRA adapter is told which tokens are its own by the host, and a grammar
        # which rows: beside them, trees are cut alike, and a grammar's chain is not.
        if self.lora_config or output.has_structured_output_requests:
            chains = {
                name: 1 + len(drafting[name])
                for name in most
                if self.requests[name].use_structured_output
            }
            trees = {name: n for name, n in most.items() if name not in chains}
            best = max(0, best + len(chains) - sum(chains.values()))
            share = tree_share([*trees.values()], len(trees) + best) if trees else 0
            return chains | {name: min(n, share) for name, n in trees.items()}, None
        return most, best

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
        if params and request.use_structured_output:
            return params.max_candidate_nodes
        return params.ngram_size - 1 if params else 0

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if not request.is_prefill_chunk:
                # Drafts under a grammar come with `update_draft_token_ids`.
                waits = request.use_structured_output and not self.is_ahead
                count = 0 if waits else self.num_drafts(request)
                request.spec_token_ids = [PLACEHOLDER] * count

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take the drafts that requests with a grammar are fed in the next step.

        Others keep their placeholders.
        """
        for request_id, drafts in zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        ):
            request = self.requests.get(request_id)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            if request.use_structured_output:
                most = self.num_drafts(request)
                request.spec_token_ids = self.chain(request, drafts, most)

    def chain(self, request: Request, drafts: list[int], most: int) -> list[int]:
        """Drafts of a request with a grammar, and what it leaves no choice about.

        Args:
            request: the request, all of whose tokens are known.
            drafts: those of the worker.
            most: of both.
        """
        manager = self.structured_output_manager
        drafts = list(manager.validate_tokens(request, drafts[:most]))
        forced = self.forced.after(request, [])
        if drafts[: len(forced)] != forced:
            drafts = forced
        elif drafts and len(drafts) < most:
            drafts += self.forced.after(request, drafts)
        return drafts[:most]

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        """Take the drafts of a step that is scheduled, and is under way if not held."""
        output: Any = scheduler_output
        scheduled = output.scheduled_spec_decode_tokens
        if not self.is_held:
            super().update_draft_token_ids_in_output(draft_token_ids, scheduler_output)
        own = dict(
            zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        )
        for request_id, placeholders in list(scheduled.items()):
            request = self.requests.get(request_id)
            if request is None or request.is_finished():
                continue
            if not request.use_structured_output:
                continue
            if not self.is_held:
                self.paths[request_id] = self.path(request_id, placeholders)
                continue
            most = len(placeholders)
            chain = self.chain(request, own.get(request_id, []), most)
            output.paths[request_id] = request.num_tokens, chain
            output.max_nodes[request_id] = 1 + len(chain)
            scheduled[request_id] = chain + [PLACEHOLDER] * (most - len(chain))

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        if self.forest:
            if times := getattr(model_runner_output, "step_times", None):
                self.forest.learn_times(*times)
            if chances := getattr(model_runner_output, "chances", None):
                self.forest.learn_chances(*chances)
        drafted = getattr(model_runner_output, "num_draft_tokens", None)
        if drafted is not None:
            placeholders = scheduler_output.scheduled_spec_decode_tokens
            scheduler_output.num_invalid_spec_tokens = {
                request_id: len(tokens)
                - min(drafted.get(request_id, 0), self.acceptable(request_id, tokens))
                for request_id, tokens in placeholders.items()
            }
        return super().update_from_output(scheduler_output, model_runner_output)

    def acceptable(self, request_id: str, drafts: list[int]) -> int:
        """Drafts of a step that a grammar, if there is one, lets the model say."""
        request = self.requests.get(request_id)
        if request is None or not request.use_structured_output:
            return len(drafts)
        return len(strip_speculative_padding(drafts))

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

    is_ahead = True
