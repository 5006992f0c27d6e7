# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner with a lookahead step inside.

The scheduler hands out N-1 drafts per request. `execute_model` widens them into
trees of T nodes; from there on the batch is vLLM's own, with T tokens per request,
until `sample` says which of them hold.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_lookahead.core.corpus import CORPUS_TOKENS
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.bigrams import ask_model
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.layers import check_layers, may_branch, no_trees
from vllm_lookahead.engine.page_memory import (
    announce,
    kept_blocks,
    kept_tokens,
    page_group,
    page_share,
)
from vllm_lookahead.engine.paths import Paths
from vllm_lookahead.engine.shares import tree_share
from vllm_lookahead.engine.support import refuse
from vllm_lookahead.engine.v2.attention import (
    answer_lone_tokens,
    attention_layers,
    install_tree_attention,
    no_tree_kernel,
    slot_views,
)
from vllm_lookahead.engine.v2.cudagraph import LookaheadCudaGraphManager
from vllm_lookahead.engine.v2.forest import TreeTrimmer
from vllm_lookahead.engine.v2.grammar import fit_masks
from vllm_lookahead.engine.v2.outputs import AsyncLookaheadOutput, Copied
from vllm_lookahead.engine.v2.sampling import TreeSampler, uses_history
from vllm_lookahead.engine.v2.sizes import RequestSizes
from vllm_lookahead.engine.v2.speculator import LookaheadSpeculator
from vllm_lookahead.engine.v2.trees import Plan, StepTrees
from vllm_lookahead.engine.v2.waiting import WaitingTrees
from vllm_lookahead.params import SALT
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.ops import TritonOps

if current_platform.is_cpu():
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as BaseModelRunner
else:
    BaseModelRunner = GPUModelRunner

logger = init_logger("vllm.lookahead")

# Tokens by which vLLM's block tables may be wider than a model's length.
TABLE_SLACK = 1024


class LookaheadModelRunner(BaseModelRunner):
    cudagraph_manager: Any
    decode_query_len: int
    speculator: Any = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.lookahead = params = vllm_config.speculative_config.params
        size = params.max_tree_size
        self.sizes = RequestSizes(self.max_num_reqs, params)
        self.waiting = WaitingTrees(self.max_num_reqs, size, device)
        self.step = StepTrees(self.max_num_reqs, self.max_num_tokens, params, device)
        others = CORPUS_TOKENS if params.pool_scope == SALT else 0
        self.ops = TritonOps(
            params,
            self.max_num_reqs,
            device,
            max_rows=self.step.max_rows,
            max_tokens=self.max_model_len + TABLE_SLACK + others,
        )
        self.speculator = LookaheadSpeculator(
            self, self.step, self.waiting, self.ops, params
        )
        self.tree_sampler = TreeSampler(self, self.step, self.ops, params)
        self.drafted: Copied | None = None  # of the step that is sampled
        self.num_scheduled: dict[str, int] = {}  # drafts of its requests, by id
        # Where a step is fed the likeliest nodes of all its trees.
        self.trimmer: TreeTrimmer | None = None
        if vllm_config.speculative_config.ranks_nodes:
            self.trimmer = TreeTrimmer(self, self.step, self.waiting)
        self.pages: BlockPages
        self.branches = params.can_branch  # until the model's layers are known
        # Whose blocks the pages ride, and how much of a text it keeps, in tokens.
        self.page_group, self.page_kept = 0, math.inf
        self.slot_views: list[torch.Tensor] = []  # none where trees are chains
        # No node of a tree lies further from its root.
        self.max_depth = params.ngram_size + params.window_size

    @property
    def speculative_config(self) -> Any:
        """None until there is a speculator: vLLM's constructor knows none for us."""
        return None if self.speculator is None else self.vllm_config.speculative_config

    @speculative_config.setter
    def speculative_config(self, config: Any) -> None:
        """vLLM's constructor takes it from `vllm_config`, as the property does."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._refuse()
        check_layers(self.vllm_config)
        layers = attention_layers(self.vllm_config)
        obstacles = chain(
            no_trees(self.vllm_config), no_tree_kernel(layers, self.dtype)
        )
        self.branches = may_branch(self.vllm_config.speculative_config, obstacles)
        if not self.branches:  # vLLM's own attention reads chains
            self.trimmer = None
            answer_lone_tokens(layers)
            return
        # What follows is sized for trees; what `load_model` sized, for N tokens.
        self.decode_query_len = max(self.decode_query_len, self.lookahead.max_tree_size)
        install_tree_attention(layers, self.step, self.device)

    def _refuse(self) -> None:
        """Raise for what trees do not run with, by name."""
        refuse(
            {
                "kv_sharing_fast_prefill": self.cache_config.kv_sharing_fast_prefill,
                "batch-sharded sampling": self.batch_sharder is not None,
                "watermarking": self.vllm_config.watermark_config is not None,
                "trace replay": self.model_config.enable_trace_replay,
                "return_sampling_mask": self.model_config.return_sampling_mask,
                "a sampler of the model's own": type(self.sampler) is not Sampler,
            }
        )

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if self.branches:
            self.cudagraph_manager = LookaheadCudaGraphManager(
                self.vllm_config,
                self.device,
                self.cudagraph_manager.cudagraph_mode,
                params=self.lookahead,
                lora_capture_cases=self.lora_capture_cases,
            )
            # It measures when graphs are captured.
            self.adaptive_verification = self.trimmer
        if is_profiling:  # graphs are captured and dropped; no request runs
            return
        groups = self.kv_cache_config.kv_cache_groups
        self.page_group = page_group(groups)
        self.page_kept = kept_tokens(groups[self.page_group].kv_cache_spec)
        block_size = groups[self.page_group].kv_cache_spec.block_size
        self.pages = BlockPages.allocate(
            self.kv_cache_config.num_blocks, block_size, self.lookahead, self.device
        )
        self.speculator.pages = self.pages
        if self.lookahead.pool_scope == SALT:
            self.speculator.corpus = Corpus(self.pages, len(groups) == 1)
        if self.branches:
            self.slot_views = slot_views(attention_layers(self.vllm_config))
        share = page_share(groups, self.lookahead)
        announce(self.lookahead, self.kv_cache_config.num_blocks, block_size, share)

    def ask_model(self) -> None:
        if self.lookahead.verification_set_size:
            tables = ask_model(self.model, self.vllm_config, self.device)
            self.speculator.bigrams = tables or self.speculator.bigrams

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            index = self.req_states.req_id_to_index[request.req_id]
            history = uses_history(self.sampler, index, request.sampling_params)
            is_chain = history or not self.branches
            self.sizes.add_request(index, request.sampling_params, is_chain)

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().update_requests(scheduler_output)
        corpus = self.speculator.corpus
        if corpus:
            corpus.update(scheduler_output)
        if copies := scheduler_output.kv_cache_block_copies:
            pairs = async_tensor_h2d(np.array(copies), device=self.device)
            self.pages.copy_blocks(*pairs.unbind(1))
            if corpus:
                corpus.owners.copy_blocks(*pairs.unbind(1))

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        drafts: Mapping[str, list[int]] = scheduler_output.scheduled_spec_decode_tokens
        self.num_scheduled = {r: len(tokens) for r, tokens in drafts.items()}
        if not dummy_run:
            self.adaptive_verification = None
            if scheduler_output.scheduled_spec_decode_tokens:
                if paths := getattr(scheduler_output, "paths", {}):
                    self.follow(paths)
                scheduler_output = self.widen(scheduler_output)
        return super().execute_model(
            scheduler_output, *args, dummy_run=dummy_run, **kwargs
        )

    def follow(self, paths: Mapping[str, tuple[int, list[int]]]) -> None:
        """Have requests with a grammar draft what the scheduler asks for.

        A scheduler that is a step ahead is then told what they are fed: it comes for
        that while the step is under way.
        """
        requests = self.req_states
        index = np.array([requests.req_id_to_index[r] for r in paths])
        drafts = self.waiting.follow(
            Paths.of(list(paths.values()), self.device),
            async_tensor_h2d(index, device=self.device),
            requests.num_computed_tokens.gpu,
            requests.last_sampled_tokens[:, 0],
            self.lookahead.ngram_size - 1,
        )
        fed: Any = SimpleNamespace(req_ids=list(paths), has_structured_output_reqs=True)
        self.draft_tokens_handler.set_draft_tokens(fed, drafts)

    def widen(self, narrow: SchedulerOutput) -> SchedulerOutput:
        """The scheduler's output with as many tokens as the trees have nodes.

        Where that is more than the step's best nodes, the trees are cut on the device.
        """
        drafts: Mapping[str, list[int]] = narrow.scheduled_spec_decode_tokens
        num_tokens = dict(narrow.num_scheduled_tokens)
        wide: dict[str, list[int]] = {}
        index = self.req_states.req_id_to_index
        cached = narrow.scheduled_cached_reqs
        # vLLM's warm-up does without our scheduler.
        max_nodes: Mapping[str, int] = getattr(narrow, "max_nodes", {})
        for req_id, computed in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        ):
            if placeholders := drafts.get(req_id):
                most = max_nodes.get(req_id, 1 + len(placeholders))
                most = min(most, self.max_model_len - computed)
                nodes = self.sizes.num_nodes(index[req_id], most)
                num_tokens[req_id] = nodes
                if nodes > 1:
                    wide[req_id] = placeholders[: nodes - 1]
        # vLLM pads the last prompt token of a request with drafts that nobody made.
        for request in narrow.scheduled_new_reqs:
            num_tokens[request.req_id] -= len(drafts.get(request.req_id, ()))
        total = sum(num_tokens.values())
        drafted = sum(num_tokens[name] - 1 for name in wide)
        best = getattr(narrow, "best_nodes", None)
        if best is None or best >= drafted:
            pass
        elif not self.trimmer:  # trees turned out to be chains when layers were loaded
            share = tree_share([num_tokens[name] for name in wide], len(wide) + best)
            for name in wide:
                num_tokens[name] = min(num_tokens[name], share)
                wide[name] = wide[name][: share - 1]
            wide = {name: tokens for name, tokens in wide.items() if tokens}
            total = sum(num_tokens.values())
        else:
            # Only the device knows whose rows of logits are whose: one chunk has all.
            most = max(0, self.tree_sampler.max_chunk_rows - len(num_tokens))
            self.trimmer.budget = min(best, most)
            self.adaptive_verification = self.trimmer
            total -= drafted - self.trimmer.budget
        return replace(
            narrow,
            num_scheduled_tokens=num_tokens,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens=wide,
        )

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        input_batch = super().prepare_inputs(*args, **kwargs)
        if self.adaptive_verification is None:
            self.step.plan = Plan.make(input_batch, self.sizes, self.device)
        return input_batch

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        step, plan = self.step, self.step.plan
        final = slot_mappings[self.page_group]
        if plan.num_trees:
            last_sampled = self.req_states.last_sampled_tokens
            step.feed(plan, self.waiting, input_batch, final, last_sampled)
            final = step.final_slot
            if self.branches:
                self._mask(input_batch)
            if int(input_batch.num_computed_tokens_np.max()) + self.max_depth >= (
                self.max_model_len
            ):
                # A window may reach past the model's length; its tokens are hints.
                input_batch.positions.clamp_(max=self.max_model_len - 1)
        else:
            step.attended = 0
        n = input_batch.num_tokens
        self.ops.write_tokens(self.pages, final[:n], input_batch.input_ids[:n])
        return block_tables, slot_mappings

    def _mask(self, input_batch: InputBatch) -> None:
        """Who sees whom, and at which positions, in the step's trees."""
        step = self.step
        step.attended = step.plan.num_trees
        if not input_batch.has_prefill:
            step.attended = step.plan.num_requests
        build_mask(
            step.trees(step.attended),
            step.position[: step.attended],
            input_batch.query_start_loc[: step.attended + 1],
            step.bits[: step.attended],
            input_batch.positions,
            input_batch.input_ids,
        )

    def page_table(self, position: torch.Tensor) -> torch.Tensor:
        """Block table of the pages, of the first requests of the step.

        Args:
            position: [B] int32, p of each.
        """
        table = self.block_tables.input_block_tables[self.page_group]
        return kept_blocks(
            table[: len(position)], position, self.page_kept, self.pages.block_size
        )

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> Any:
        self.step.forget()
        return super().prepare_dummy_attn(*args, **kwargs)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        self.step.forget()
        return super().capture_model(*args, **kwargs)

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        d, step = self.step.plan.num_trees, self.step
        if not d:
            return super().sample(hidden_states, input_batch, grammar_output)
        self.drafted = Copied(input_batch.req_ids[:d], step.longest[:d], self)
        output, verdict, answers = self.tree_sampler.sample(
            hidden_states, input_batch, grammar_output
        )
        position = step.position[:d]
        batch = step.plan.batch(self.page_table(position), position, step.root[:d])
        if self.slot_views:
            self.ops.compact(self.slot_views, batch, verdict, self.pages.block_size)
        trees = step.trees(d)
        self.ops.update(self.pages, batch, trees, step.sampled_tokens(d), verdict)
        self.ops.keep_answers(self.pages, batch, trees, verdict, answers)
        return output, output.num_sampled, output.num_rejected

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        self.drafted = None
        # Of the step before: on the host by the time that this step's output is.
        chances, self.speculator.chances = self.speculator.chances, None
        if grammar_output is not None:
            worker = self.structured_outputs_worker
            grammar_output = fit_masks(worker, grammar_output)
        output = super().sample_tokens(grammar_output)
        if self.drafted is None and chances is None:
            return output
        times = self.trimmer and self.trimmer.take_times()
        return AsyncLookaheadOutput(output, self.drafted, chances, times)

    def shutdown(self) -> None:
        # Views keep the K/V cache alive.
        for name in ("slot_views", "pages", "ops"):
            self.__dict__.pop(name, None)
        vars(self.speculator).pop("pages", None)
        self.speculator.corpus = None
        super().shutdown()

    @torch.inference_mode()
    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        super()._dummy_sampler_run(hidden_states)
        # The sampler saw one row per request. A step has more, in two precisions.
        step = self.step
        rows = min(
            step.max_rows, max(self.tree_sampler.max_chunk_rows, step.rows_per_request)
        )
        index = torch.arange(rows, device=self.device) % hidden_states.shape[0]
        logits = self.model.compute_logits(hidden_states[index])
        torch.empty_like(logits, dtype=torch.float32).copy_(logits).argmax(-1)
