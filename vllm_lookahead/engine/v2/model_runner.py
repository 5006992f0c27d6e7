# SPDX-License-Identifier: Apache-2.0
"""The V2 model runner with a lookahead step inside.

The scheduler hands out N-1 drafts per request. `execute_model` widens them into
trees of T nodes; from there on the batch is vLLM's own, with T tokens per request,
until `sample` says which of them hold.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_lookahead.core.corpus import CORPUS_TOKENS
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.engine.bigrams import ask_model
from vllm_lookahead.engine.corpus import Corpus
from vllm_lookahead.engine.page_memory import announce, page_share
from vllm_lookahead.engine.support import refuse
from vllm_lookahead.engine.v2.attention import (
    attention_layers,
    install_tree_attention,
    slot_views,
)
from vllm_lookahead.engine.v2.cudagraph import LookaheadCudaGraphManager
from vllm_lookahead.engine.v2.grammar import fit_masks
from vllm_lookahead.engine.v2.outputs import AsyncLookaheadOutput, Drafted
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
        self.drafted: Drafted | None = None  # of the step that is sampled
        self.pages: BlockPages
        self.slot_views: list[torch.Tensor]
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
        # What follows is sized for trees; what `load_model` sized, for N tokens.
        self.decode_query_len = max(self.decode_query_len, self.lookahead.max_tree_size)
        layers = attention_layers(self.vllm_config)
        install_tree_attention(layers, self.step, self.dtype, self.device)

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
        self.cudagraph_manager = LookaheadCudaGraphManager(
            self.vllm_config,
            self.device,
            self.cudagraph_manager.cudagraph_mode,
            params=self.lookahead,
            lora_capture_cases=self.lora_capture_cases,
        )
        if is_profiling:  # graphs are captured and dropped; no request runs
            return
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(
                f"lookahead needs one kind of K/V cache; this model has {len(groups)}: "
                "start without lookahead"
            )
        block_size = groups[0].kv_cache_spec.block_size
        self.pages = BlockPages.allocate(
            self.kv_cache_config.num_blocks, block_size, self.lookahead, self.device
        )
        self.speculator.pages = self.pages
        if self.lookahead.pool_scope == SALT:
            self.speculator.corpus = Corpus(self.pages)
        self.slot_views = slot_views(attention_layers(self.vllm_config))
        share = page_share(self.get_kv_cache_spec().values(), self.lookahead)
        announce(self.lookahead, self.kv_cache_config.num_blocks, block_size, share)

    def ask_model(self) -> None:
        if self.lookahead.verification_set_size:
            tables = ask_model(self.model, self.vllm_config, self.device)
            self.speculator.bigrams = tables or self.speculator.bigrams

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            index = self.req_states.req_id_to_index[request.req_id]
            chain = uses_history(self.sampler, index, request.sampling_params)
            self.sizes.add_request(index, request.sampling_params, chain)

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
        if not dummy_run and scheduler_output.scheduled_spec_decode_tokens:
            scheduler_output = self.widen(scheduler_output)
        return super().execute_model(
            scheduler_output, *args, dummy_run=dummy_run, **kwargs
        )

    def widen(self, narrow: SchedulerOutput) -> SchedulerOutput:
        """The scheduler's output with as many tokens as the trees have nodes."""
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
        return replace(
            narrow,
            num_scheduled_tokens=num_tokens,
            total_num_scheduled_tokens=sum(num_tokens.values()),
            scheduled_spec_decode_tokens=wide,
        )

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        input_batch = super().prepare_inputs(*args, **kwargs)
        self.step.plan = Plan.make(input_batch, self.sizes, self.device)
        return input_batch

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        step, plan = self.step, self.step.plan
        final = slot_mappings[0]
        if plan.num_trees:
            last_sampled = self.req_states.last_sampled_tokens
            step.feed(plan, self.waiting, input_batch, final, last_sampled)
            final = step.final_slot
            step.attended = plan.num_trees
            if not input_batch.has_prefill:
                step.attended = plan.num_requests
            build_mask(
                step.trees(step.attended),
                step.position[: step.attended],
                input_batch.query_start_loc[: step.attended + 1],
                step.bits[: step.attended],
                input_batch.positions,
                input_batch.input_ids,
            )
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
        self.drafted = Drafted(
            input_batch.req_ids[:d],
            step.longest[:d],
            self.main_stream,
            self.output_copy_stream,
        )
        output, verdict, answers = self.tree_sampler.sample(
            hidden_states, input_batch, grammar_output
        )
        batch = step.plan.batch(
            self.block_tables.input_block_tables[0], step.position[:d], step.root[:d]
        )
        self.ops.compact(self.slot_views, batch, verdict, self.pages.block_size)
        trees = step.trees(d)
        self.ops.update(self.pages, batch, trees, step.sampled_tokens(d), verdict)
        self.ops.keep_answers(self.pages, batch, trees, verdict, answers)
        return output, output.num_sampled, output.num_rejected

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        self.drafted = None
        if grammar_output is not None:
            worker = self.structured_outputs_worker
            grammar_output = fit_masks(worker, grammar_output)
        output = super().sample_tokens(grammar_output)
        if self.drafted is None:
            return output
        return AsyncLookaheadOutput(output, self.drafted)

    def shutdown(self) -> None:
        # Views keep the K/V cache alive.
        for name in ("slot_views", "pages", "ops"):
            self.__dict__.pop(name, None)
        vars(self.speculator).pop("pages", None)
        self.speculator.corpus = None
        super().shutdown()

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        draft_token_ids = super().take_draft_token_ids()
        # Our scheduler marks by itself which requests draft, and how many.
        return draft_token_ids if self.scheduler_config.async_scheduling else None

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
