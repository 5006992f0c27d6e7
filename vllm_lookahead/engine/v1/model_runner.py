# SPDX-License-Identifier: Apache-2.0
"""The V1 model runner, widened.

The scheduler sends each drafting request N-1 placeholders. The runner replaces
them with a draft tree before vLLM prepares its inputs, samples along the tree, and
hands vLLM the tokens that were emitted. Everything else is plain vLLM.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    SchedulerOutput,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.core.pages import EMPTY, BlockPages
from vllm_lookahead.engine.bigrams import ask_model
from vllm_lookahead.engine.config import LookaheadConfig
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.layers import check_layers, may_branch, no_trees
from vllm_lookahead.engine.outputs import LookaheadModelRunnerOutput
from vllm_lookahead.engine.page_memory import (
    announce,
    cache_groups,
    kept_tokens,
    page_group,
    page_share,
)
from vllm_lookahead.engine.support import refuse
from vllm_lookahead.engine.v1 import linear
from vllm_lookahead.engine.v1.attention import (
    ChainAttentionBackend,
    TreeAttentionBackend,
    slot_views,
)
from vllm_lookahead.engine.v1.drafter import TreeDrafter
from vllm_lookahead.engine.v1.grammar import apply_grammar
from vllm_lookahead.engine.v1.sampling import sample_along_trees
from vllm_lookahead.engine.v1.step_time import StepTime, table_of, time_steps
from vllm_lookahead.engine.v1.trees import StepTrees
from vllm_lookahead.numba_kernels.ops import NumbaOps, warm_up
from vllm_lookahead.params import SALT

logger = init_logger("vllm.lookahead")  # names outside vllm have no handler
# Those whose metadata `StepTrees.attention_inputs` is enough for.
OUR_BACKENDS = (ChainAttentionBackend, TreeAttentionBackend)


class LookaheadCPUModelRunner(CPUModelRunner):
    """CPUModelRunner that feeds draft trees.

    Attributes:
        config, params: the server's, and its sizes.
        branches: whether trees may; else they are chains.
        is_scheduled_ahead: whether a step is scheduled before the last one ended.
        pages: block-resident state, allocated with the K/V cache.
        page_group, page_kept: the group of K/V caches whose blocks they ride, and how
            much of a text it keeps, in tokens.
        tree_drafter: what drafts are made of.
        slot_views: the K/V that compaction moves, none where trees are chains.
        step: the trees of the step in flight, None in a step without any.
        num_scheduled: request id -> drafts that the scheduler knows of, in that step.
        feeds_alone: whether a step of trees alone needs nothing of vLLM's inputs.
    """

    def __init__(
        self,
        vllm_config: Any,
        device: torch.device,
        config: LookaheadConfig,
        is_scheduled_ahead: bool,
    ) -> None:
        fast_prefill = vllm_config.cache_config.kv_sharing_fast_prefill
        refuse({"kv_sharing_fast_prefill": fast_prefill})
        super().__init__(vllm_config, device)
        self.config, self.params = config, config.params
        self.is_scheduled_ahead = is_scheduled_ahead
        self.ops = NumbaOps()
        self.branches = False  # until the model's layers are known
        self.pages: BlockPages
        self.page_group, self.page_kept = 0, math.inf
        self.tree_drafter = TreeDrafter(self.params, self.ops, self.max_num_tokens)
        self.slot_views: list[torch.Tensor] = []
        self.step: StepTrees | None = None
        self.num_scheduled: dict[str, int] = {}
        self.idle_generators: dict[int, torch.Generator] = {}
        self.feeds_alone = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        check_layers(self.vllm_config)
        self.branches = may_branch(self.config, no_trees(self.vllm_config))
        self.tree_drafter.branches = self.branches
        self.tree_drafter.ranks_nodes = self.config.ranks_nodes
        if linear.is_useful():
            num_layers = linear.replace_linear_layers(self.model)
            logger.info("%d layers multiply the rows of a tree at once.", num_layers)

    def page_share(self) -> float:
        """The part of K/V memory that pages take."""
        groups = cache_groups(self.vllm_config, self.get_kv_cache_spec())
        return page_share(groups, self.params)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any):
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        groups = kv_cache_config.kv_cache_groups
        self.page_group = page_group(groups)
        self.page_kept = kept_tokens(groups[self.page_group].kv_cache_spec)
        block_tables = self.input_batch.block_table.block_tables
        block_size = block_tables[self.page_group].block_size
        shared = all(t.slot_mapping.gpu is t.slot_mapping.cpu for t in block_tables)
        plain = not (self.lora_config or self.enable_prompt_embeds or self.uses_mrope)
        one_group = len(self.attn_groups) == len(self.attn_groups[0]) == 1
        ours = one_group and self.attn_groups[0][0].backend in OUR_BACKENDS
        self.feeds_alone = ours and shared and plain
        # A kernel's blocks may be smaller than those that vLLM hands out.
        smaller = groups[self.page_group].kv_cache_spec.block_size // block_size
        num_blocks = kv_cache_config.num_blocks * smaller
        self.pages = BlockPages.allocate(num_blocks, block_size, self.params)
        if self.params.pool_scope == SALT:
            self.tree_drafter.corpus = Corpus(self.pages, len(groups) * smaller == 1)
        if self.branches:
            self.slot_views = [v for kv in self.kv_caches for v in slot_views(kv)]
        warm_up(self.params, block_size, self.slot_views)
        share = page_share(groups, self.params)
        announce(self.params, num_blocks, block_size, share)

    def ask_model(self) -> None:
        if self.params.verification_set_size:
            tables = ask_model(self.model, self.vllm_config, self.device)
            if tables is not None:
                self.tree_drafter.bigrams, self.tree_drafter.bigram_logprobs = tables

    @torch.inference_mode()
    def time_steps(self) -> None:
        """Tell the drafter what a step costs, before there is one."""
        if not self.config.ranks_nodes or self.params.max_tree_size == 1:
            return

        def run(num_tokens: int) -> None:
            hidden, _ = self._dummy_run(num_tokens)
            if not self.lora_config:  # its logits know one row per request
                self.model.compute_logits(hidden[:num_tokens])

        def agree(seconds: float) -> float:
            return get_tp_group().broadcast_object(seconds, src=0)

        largest = min(
            self.max_num_tokens, self.max_num_reqs * self.params.max_tree_size
        )
        table = table_of(time_steps(run, largest, agree), self.max_num_tokens)
        self.tree_drafter.forest.step_time = StepTime(table)

    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> Any:
        # Widening must not reach the scheduler's own copy.
        scheduler_output = replace(
            scheduler_output,
            scheduled_cached_reqs=self._corrected(
                scheduler_output.scheduled_cached_reqs
            ),
            num_scheduled_tokens=scheduler_output.num_scheduled_tokens.copy(),
            scheduled_spec_decode_tokens=(
                scheduler_output.scheduled_spec_decode_tokens.copy()
            ),
        )
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self.num_scheduled = {r: len(tokens) for r, tokens in drafts.items()}
        self.tree_drafter.start_step(self.step)
        self.step = None
        output = super().execute_model(scheduler_output, *args, **kwargs)
        may_sample = not scheduler_output.has_structured_output_requests
        if output is None and may_sample and not self.is_scheduled_ahead:
            # No grammar to wait for: save the scheduler a round trip.
            return self.sample_tokens(None)
        return output

    def _corrected(self, cached: CachedRequestData) -> CachedRequestData:
        """Cached requests with the true count of computed tokens.

        A scheduler one step ahead takes every draft for accepted. All tokens but
        the last one sampled are computed once a prompt is.
        """
        num_computed_tokens = [
            min(computed, self.requests[request_id].num_tokens - 1)
            for request_id, computed in zip(
                cached.req_ids, cached.num_computed_tokens, strict=True
            )
        ]
        return replace(cached, num_computed_tokens=num_computed_tokens)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.tree_drafter.remove_request(request_id)
        result = super()._update_states(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self.tree_drafter.add_request(request.req_id, request.sampling_params)
        if corpus := self.tree_drafter.corpus:
            corpus.update(scheduler_output)
        if scheduler_output.scheduled_spec_decode_tokens:
            self.step = self.tree_drafter.draft(self, scheduler_output, self.pages)
        return result

    def _lone_step(self) -> StepTrees | None:
        """`step`, if it makes all inputs itself."""
        step = self.step
        if step is None or step.verdict is not None:
            return None
        return step if self.feeds_alone and step.only_decodes else None

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        total = scheduler_output.total_num_scheduled_tokens
        if step := self._lone_step():
            slots = step.feed_alone(self, self.pages.block_size)
            self.ops.write_tokens(self.pages, slots, step.batch.root)
            rows = step.flat.logits_indices
            # A slice makes no copy of the hidden states.
            every = len(rows) == total
            return slice(total) if every else torch.from_numpy(rows), None, 1
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        table = self.input_batch.block_table[self.page_group]
        slots = table.slot_mapping.cpu[:total]
        if self.step is None:
            self.ops.write_tokens(self.pages, slots, self._tokens(total))
            return prepared
        self.step.feed(self)
        flat = self.step.flat
        if self.lora_config:  # vLLM saw one row of logits per request
            num_rows = np.diff(flat.logits_start)
            self.set_active_loras(self.input_batch, num_scheduled_tokens, num_rows)
        final = slots.where(torch.from_numpy(flat.is_final), -1)
        self.ops.write_tokens(self.pages, final, self._tokens(total))
        return torch.from_numpy(flat.logits_indices), *prepared[1:]

    def _tokens(self, total: int) -> torch.Tensor:
        """[total] int32 of the batch, EMPTY where a prompt is embeddings."""
        tokens = self.input_ids.cpu[:total]
        if not self.enable_prompt_embeds:
            return tokens
        return tokens.where(self.is_token_ids.cpu[:total], EMPTY)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if step := self._lone_step():
            (group,) = self.attn_groups[0]
            shared = group.build_metadata(step.attention_inputs(self))
            metadata, common = dict.fromkeys(group.layer_names, shared), None
        else:
            metadata, common = super()._build_attention_metadata(*args, **kwargs)
        if self.step is not None and self.branches:
            trees = self.step.branched()
            for layer in metadata.values():
                layer.trees = trees
        return metadata, common

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        # A prompt chunk samples a token that is thrown away. vLLM then winds the
        # seeded generator back, which a CPU generator cannot: draw nothing instead.
        generators = self.input_batch.generators
        chunks = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        for i in chunks[0].tolist():
            if i in generators:
                self.idle_generators[i] = generators.pop(i)
        if self.step is None:
            return super()._sample(logits, spec_decode_metadata)
        logits = logits.float()  # once: rows are ranked as well as sampled
        output, sampled, verdict = sample_along_trees(
            self, self.ops, self.params, self.step, logits
        )
        batch, tree = self.step.batch, self.step.tree
        if self.slot_views:
            self.ops.compact(self.slot_views, batch, verdict, self.pages.block_size)
        self.ops.update(self.pages, batch, tree, sampled, verdict)
        if self.params.verification_set_size:
            answers = self.step.answers(logits)
            self.ops.keep_answers(self.pages, batch, tree, verdict, answers)
        self.step.verdict = verdict
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._bookkeeping_sync(*args, **kwargs)
        self.input_batch.generators.update(self.idle_generators)
        self.idle_generators.clear()
        return result

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        step, state = self.step, self.execute_model_state  # type: ignore[has-type]
        if step is not None and state is not None and grammar_output is not None:
            logits = apply_grammar(
                state.logits,
                step,
                self.input_batch.req_ids,
                self.num_scheduled,
                grammar_output,
            )
            self.execute_model_state = state._replace(logits=logits)
            grammar_output = None
        self_output = super().sample_tokens(grammar_output)
        if step is None or not isinstance(self_output, ModelRunnerOutput):
            return self_output
        return LookaheadModelRunnerOutput.wrap(self_output, step.num_draft_tokens())

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Chains of the requests with a grammar, which the scheduler has to check.

        Of the step under way, if there is one; else of the next one, which is fed what
        the scheduler makes of them.
        """
        drafter = self.tree_drafter
        if self.execute_model_state is None:
            chains = drafter.draft_ahead(self, self.pages)
        else:
            chains = self.step.chains(drafter.grammars) if self.step else {}
        return DraftTokenIds(list(chains), list(chains.values())) if chains else None
