# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs are captured, and which of them a step may replay.

Three families, for steps without a prefill:

    plain    one token per request; vLLM's attention
    uniform  a whole tree of T nodes per request; ours
    varlen   any mix of 1 to T nodes per request; ours

A step with a prefill has vLLM's piecewise graphs. Graphs are counted in trees, not
in tokens: at T = 120, vLLM's grid of sizes would hold a handful of useful ones.
"""

from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    ModelCudaGraphManager,
)

# Beyond this many tokens a step of a 7B model takes far longer than its launches.
MAX_GRAPH_TOKENS = 2048
TREE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def tree_counts(
    max_tree_size: int, max_num_reqs: int, max_num_tokens: int
) -> list[int]:
    """Batch sizes, in whole trees, to capture graphs for; ascending."""
    limit = min(MAX_GRAPH_TOKENS, max_num_tokens)
    return [n for n in TREE_COUNTS if n <= max_num_reqs and n * max_tree_size <= limit]


class LookaheadCudaGraphManager(ModelCudaGraphManager):
    """vLLM's graphs, as it would capture them without drafts, and those of trees."""

    def __init__(
        self, vllm_config: Any, *args: Any, max_tree_size: int, **kwargs: Any
    ) -> None:
        self.max_tree_size = max_tree_size
        super().__init__(vllm_config, *args, decode_query_len=1, **kwargs)

    def _init_candidates(self) -> None:
        super()._init_candidates()
        mode = self.cudagraph_mode
        if (
            self.max_tree_size == 1
            or not self.compilation_config.cudagraph_capture_sizes
            or not mode.separate_routine()
            or mode.decode_mode() != CUDAGraphMode.FULL
        ):
            return
        size = self.max_tree_size
        scheduler = self.vllm_config.scheduler_config
        counts = tree_counts(size, self.max_num_reqs, scheduler.max_num_batched_tokens)
        captured = self._capture_descs.setdefault(CUDAGraphMode.FULL, [])
        for loras in self.lora_capture_cases:
            previous = 0
            for count in counts:
                tokens = count * size
                trees = [
                    BatchExecutionDescriptor(
                        cg_mode=CUDAGraphMode.FULL,
                        num_tokens=tokens,
                        num_reqs=count,
                        uniform_token_count=size,
                        num_active_loras=loras,
                    ),
                    BatchExecutionDescriptor(
                        cg_mode=CUDAGraphMode.FULL,
                        num_tokens=tokens,
                        num_reqs=min(tokens, self.max_num_reqs),
                        max_query_len=size,
                        num_active_loras=loras,
                    ),
                ]
                captured += trees
                for tokens_run in range(previous + 1, tokens + 1):
                    self._prefer(tokens_run, loras, trees)
                previous = tokens
        # The largest first: it sizes the buffer that all of them write.
        captured.sort(key=lambda desc: desc.num_tokens, reverse=True)

    def _prefer(
        self, num_tokens: int, loras: int, trees: list[BatchExecutionDescriptor]
    ) -> None:
        """Full graphs before piecewise ones, the least general first."""
        known = self._candidates.setdefault((num_tokens, loras), [])
        full = sum(desc.cg_mode == CUDAGraphMode.FULL for desc in known)
        known[full:full] = trees

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        # A step without trees prepares no trees for a graph to read.
        if max_query_len == 1:
            max_query_len = None
        return super().dispatch(
            num_reqs,
            num_tokens,
            uniform_token_count,
            num_active_loras,
            max_query_len,
            **kwargs,
        )
