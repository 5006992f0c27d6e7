# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs are captured, and which of them a step may replay.

Two families, for steps without a prefill:

    plain   one token per request; vLLM's attention
    trees   any mix of 1 to T nodes per request; ours

A step with a prefill has vLLM's piecewise graphs. Those of trees are for a few numbers
of requests, and for each of a few numbers of tokens, up to vLLM's largest graph: what a
step feeds follows from its requests' chances and can be any number. Of up to 256
requests, so their number does not grow with `max_num_seqs`: about 70.
"""

from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    ModelCudaGraphManager,
)

from vllm_lookahead.params import LookaheadParams

# Most requests of a graph of trees. Its attention has a program for each of them, busy
# or not, and splits contexts by them: they are all that is known at capture.
REQUESTS = (1, 4, 8, 16, 64, 256)
# A graph pads a batch with so many tokens at most, or with a third.
PADDING = 16


def tree_batches(
    params: LookaheadParams, max_num_reqs: int, max_num_tokens: int, largest: int
) -> list[tuple[int, int]]:
    """Most requests and tokens of the graphs of trees; ascending.

    Args:
        params: the server's.
        max_num_reqs, max_num_tokens: of a step.
        largest: tokens of vLLM's largest graph. One tree has graphs even so.
    """
    tree, batches, fewest = params.max_tree_size, [], 2
    counts = sorted({min(count, max_num_reqs) for count in REQUESTS})
    for count in counts if tree > 1 else ():
        most = min(count * tree, max_num_tokens, max(tree, largest))
        batches += [(count, size) for size in _ladder(most) if size >= fewest]
        fewest = count + 1
    return batches


def _ladder(most: int) -> list[int]:
    """Few numbers of tokens, each not much more than the one below."""
    sizes, octave = [*range(PADDING, 4 * PADDING, PADDING)], 4 * PADDING
    while octave < most:
        sizes += [octave, octave * 5 // 4, octave * 3 // 2]
        octave *= 2
    return [*(size for size in sizes if size < most), most]


class LookaheadCudaGraphManager(ModelCudaGraphManager):
    """vLLM's graphs, as it would capture them without drafts, and those of trees."""

    def __init__(
        self, vllm_config: Any, *args: Any, params: LookaheadParams, **kwargs: Any
    ) -> None:
        self.params = params
        super().__init__(vllm_config, *args, decode_query_len=1, **kwargs)

    def _init_candidates(self) -> None:
        super()._init_candidates()
        mode = self.cudagraph_mode
        if (
            not self.compilation_config.cudagraph_capture_sizes
            or not mode.separate_routine()
            or mode.decode_mode() != CUDAGraphMode.FULL
        ):
            return
        captured = self._capture_descs.setdefault(CUDAGraphMode.FULL, [])
        for loras in self.lora_capture_cases:
            # The least general one goes before the others.
            for desc, fewest in reversed(self._tree_graphs(loras)):
                captured.append(desc)
                for num_tokens in range(fewest, desc.num_tokens + 1):
                    key = num_tokens, loras
                    self._candidates.setdefault(key, []).insert(0, desc)
        # The largest first: it sizes the buffer that all of them write.
        captured.sort(key=lambda desc: desc.num_tokens, reverse=True)

    def _tree_graphs(self, loras: int) -> list[tuple[BatchExecutionDescriptor, int]]:
        """Graphs of trees, each with the fewest tokens that it is for."""
        tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        largest = self.compilation_config.max_cudagraph_capture_size
        limits = self.params, self.max_num_reqs, tokens, largest
        graphs = []
        smaller: dict[int, int] = {}
        for count, size in tree_batches(*limits):
            desc = BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.FULL,
                num_tokens=size,
                num_reqs=min(size, count),
                max_query_len=self.params.max_tree_size,
                num_active_loras=loras,
            )
            graphs.append((desc, smaller.get(count, 0) + 1))
            smaller[count] = size
        return graphs

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
