# SPDX-License-Identifier: Apache-2.0
"""Which CUDA graphs are captured, and which of them a step may replay.

Three families, for steps without a prefill:

    plain    one token per request; vLLM's attention
    uniform  as many nodes for each request; ours
    varlen   any mix of 1 to T nodes per request; ours

A step with a prefill has vLLM's piecewise graphs. Those of trees are for the batches
that `LookaheadScheduler` makes: whole trees for a few requests, narrower ones for
more, and one token for each request that drafts nothing. Of up to 256 requests, so
their number does not grow with `max_num_seqs`: about 60.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    ModelCudaGraphManager,
)

from vllm_lookahead.engine.shares import COUNTS, nodes_within, tree_budget
from vllm_lookahead.params import LookaheadParams

# Most requests of a varlen graph. Its attention has a program for each of them, busy
# or not, and splits contexts by them: they are all that is known at capture. Up to
# `MAX_TREE_TOKENS // 2` requests can draft. With as many again that do not, a batch
# has some 500 tokens, and vLLM by default captures no graph of more than 512: larger
# batches have its piecewise graphs or none, as without trees.
REQUESTS = (4, 8, 16, 64, 128, 256)
# Tokens that a varlen graph may pad a batch with: so few, or a quarter.
PADDING = 16


def uniform_batches(
    params: LookaheadParams, max_num_reqs: int, max_num_tokens: int
) -> list[tuple[int, int]]:
    """Most requests of a batch that drafts alike, and the nodes of each; ascending."""
    batches = []
    verified = 1 + params.max_candidate_nodes
    budget = tree_budget(params.max_tree_size, max_num_tokens)
    for count in COUNTS:
        width = nodes_within(params.max_tree_size, verified, budget // count)
        if width == 1:
            break
        batches.append((min(count, max_num_reqs), width))
        if count >= max_num_reqs:
            break
    return batches


def mixed_batches(
    params: LookaheadParams, max_num_reqs: int, max_num_tokens: int
) -> list[tuple[int, int]]:
    """Most requests and tokens of the varlen graphs; ascending."""
    widths: list[int] = []  # by requests that draft, less one
    for count, width in uniform_batches(params, max_num_reqs, max_num_tokens):
        widths += [width] * (count - len(widths))
    budget = tree_budget(params.max_tree_size, max_num_tokens)
    batches: list[tuple[int, int]] = []
    first = 2
    most = min(max_num_reqs, REQUESTS[-1])
    for last in [*(n for n in REQUESTS if n < most), most]:
        # Requests with sizes of their own may fill the share to the last token.
        sizes = {min(budget + last - 1, last * params.max_tree_size)}
        for count in range(first, last + 1):
            for drafting, width in enumerate(widths[:count], 1):
                sizes.add(drafting * width + count - drafting)
        # A request whose tokens depend on their history drafts a chain.
        for count in range(first if batches else 1, last + 1):
            if count * params.ngram_size <= budget:
                sizes.add(count * params.ngram_size)
        if not batches:  # smaller trees, of a request with sizes of its own
            sizes.update(_halves(params.max_tree_size))
        sizes = {min(size, max_num_tokens) for size in sizes}
        batches += [(last, size) for size in _cover(sizes)]
        first = last + 1
    return batches


def _halves(tree: int) -> Iterable[int]:
    while tree > 2 * PADDING:
        tree = -(-tree // 2)
        yield tree


def _cover(sizes: Iterable[int]) -> list[int]:
    """Few of the sizes, so that the next one up is not much more than any."""
    few: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not few or max(1.25 * size, size + PADDING) < few[-1]:
            few.append(size)
    return few[::-1]


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
        full = partial(
            BatchExecutionDescriptor,
            cg_mode=CUDAGraphMode.FULL,
            num_active_loras=loras,
        )
        max_num_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        limits = self.params, self.max_num_reqs, max_num_tokens
        graphs, previous = [], 0
        for count, width in uniform_batches(*limits):
            desc = full(
                num_tokens=count * width, num_reqs=count, uniform_token_count=width
            )
            graphs.append((desc, (previous + 1) * width))
            previous = count
        if not graphs:  # no tree has a second node
            return graphs
        largest: dict[int, int] = {}
        for last, size in mixed_batches(*limits):
            desc = full(
                num_tokens=size,
                num_reqs=min(size, last),
                max_query_len=self.params.max_tree_size,
            )
            graphs.append((desc, largest.get(last, 1) + 1))
            largest[last] = size
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
