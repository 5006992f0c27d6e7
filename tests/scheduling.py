# SPDX-License-Identifier: Apache-2.0
"""A scheduler without an engine."""

import itertools
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_lookahead.engine.scheduler import LookaheadScheduler

BATCHED, BLOCK, N, T = 8192, 16, 5, 120
SIZES = {"window_size": 15, "ngram_size": N, "verification_set_size": 15}
OFF = {"lookahead": 0}
names = itertools.count()


class Driver:
    """A scheduler whose requests all accept nothing."""

    def __init__(
        self, model: str, worker: str, picked: bool = False, **sizes: int
    ) -> None:
        """
        Args:
            model: a folder with its config.
            worker: a class by its path.
            picked: whether lookahead picks all sizes by itself.
            sizes: other than `SIZES`.
        """
        config = EngineArgs(
            model,
            skip_tokenizer_init=True,
            max_num_batched_tokens=BATCHED,
            max_num_seqs=256,
            max_model_len=65536,
            block_size=BLOCK,
            async_scheduling=False,
            enable_prefix_caching=False,
            speculative_config={"method": "lookahead"}
            | ({} if picked else SIZES | sizes),
        ).create_engine_config()
        config.parallel_config.worker_cls = worker
        config.cache_config.num_gpu_blocks = 16384
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32
        )
        cache = KVCacheConfig(
            num_blocks=16384,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.scheduler = LookaheadScheduler(
            config, cache, StructuredOutputManager(config), block_size=BLOCK
        )

    def add(self, length: int, count: int = 1, **extra: int) -> list[str]:
        ids = [f"r{next(names)}" for _ in range(count)]
        for name in ids:
            params = SamplingParams(max_tokens=1000, extra_args=extra)
            request = Request(name, [1] * length, params, None)
            self.scheduler.add_request(request)
        return ids

    def step(self) -> Any:
        output = self.scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        done = [not self.scheduler.requests[name].is_prefill_chunk for name in ids]
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: i for i, name in enumerate(ids)},
            sampled_token_ids=[[7] if d else [] for d in done],
        )
        self.scheduler.update_from_output(output, result)
        return output

    def blocks(self, name: str) -> int:
        (ids,) = self.scheduler.kv_cache_manager.get_block_ids(name)
        return len(ids)
