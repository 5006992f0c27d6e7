# SPDX-License-Identifier: Apache-2.0
"""The launches that `test_aot_compile` compiles: sizes a server is started with."""

from collections.abc import Callable
from dataclasses import replace

import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.noise import gpu_noise
from vllm_lookahead.core.pages import NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.answers import likeliest_tokens
from vllm_lookahead.triton_kernels.compact import LayerCaches, compact
from vllm_lookahead.triton_kernels.gather import Starts, gather_starts
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.ops import TritonOps
from vllm_lookahead.triton_kernels.rank import rank_nodes
from vllm_lookahead.triton_kernels.waiting import (
    FedTrees,
    LogitsRows,
    feed_trees,
    store_trees,
)

NUM_BLOCKS, MAX_BLOCKS, MAX_REQUESTS, VOCAB = 4096, 2048, 256, 128_256
# (W, N, G), block size, requests
SERVERS = {
    "default": ((15, 5, 15), 16, 1),
    "batch": ((15, 5, 15), 16, 64),
    "no-window": ((0, 5, 15), 16, 256),
    "bigram": ((1, 2, 1), 16, 8),
    "long-ngram": ((5, 16, 7), 32, 8),
    "large-blocks": ((20, 5, 20), 128, 4),
    "widest": ((40, 6, 62), 16, 2),
}
# Type, and shape of a cache [num_blocks, heads, block_size, width] or the other way
CACHES = {
    "compact-heads-first": (torch.bfloat16, (NUM_BLOCKS, 8, 16, 256), True),
    "compact-float32": (torch.float32, (NUM_BLOCKS, 16, 8, 128), False),
    "compact-fp8": (torch.float8_e4m3fn, (NUM_BLOCKS, 16, 8, 256), False),
    "compact-odd": (torch.float8_e4m3fn, (NUM_BLOCKS, 3, 16, 85), True),
}


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def some_batch(b: int) -> RequestBatch:
    return RequestBatch(meta(b, MAX_BLOCKS), *meta(6, b).unbind(0))


def some_hints(b: int, n: int) -> Hints:
    shape = VOCAB, NUM_SUCCESSORS
    return Hints(
        bigrams=meta(*shape),
        bigram_logprobs=meta(*shape, dtype=torch.float32),
        temperature=meta(b, dtype=torch.float32),
        seeds=meta(b, 1, dtype=torch.int64).expand(-1, n - 1),
        noise=gpu_noise,
        least=0.01,
    )


def step(
    params: LookaheadParams,
    block_size: int,
    b: int,
    ops: TritonOps | None = None,
    before: torch.Tensor | None = None,
) -> None:
    """Every launch of a step but attention."""
    ops = ops or TritonOps(params, b, "meta", max_tokens=MAX_BLOCKS * block_size)
    pages = BlockPages.allocate(NUM_BLOCKS, block_size, params, "meta")
    batch = some_batch(b)
    n, g, t = params.ngram_size, params.verification_set_size, params.max_tree_size
    tokens = b * t
    ops.write_tokens(pages, meta(tokens, dtype=torch.int64), meta(tokens))
    hints = replace(some_hints(b, n), before=before)
    tree, chances = ops.draft(pages, batch, hints, g)
    by_slot(tree, chances, n)
    build_mask(
        tree,
        batch.position,
        meta(b + 1),
        meta(b, t, -(-t // 32)),
        meta(tokens, dtype=torch.int64),
        meta(tokens),
    )
    sampled = meta(b, t, dtype=torch.int64)
    verdict = ops.verify(tree, sampled, n)
    # vLLM: K and V of a head side by side
    cache = meta(NUM_BLOCKS, block_size, 8, 256, dtype=torch.bfloat16)
    ops.compact([cache] * 32, batch, verdict, block_size)
    ops.update(pages, batch, tree, sampled, verdict)
    said = ops.likeliest_tokens(meta(tokens, VOCAB, dtype=torch.bfloat16))
    ops.keep_answers(pages, batch, tree, verdict, Answers(*said, meta(b)))


def by_slot(tree: DraftTree, chances: torch.Tensor, n: int) -> None:
    """Trees put away, cut and fed; what the host says of them is in one buffer."""
    s, (b, t) = MAX_REQUESTS, tree.tokens.shape
    columns, num_nodes = meta(4, s, t), meta(s)
    slots, long = meta(b, dtype=torch.int64), torch.int64
    waiting = columns, num_nodes, meta(s, t, dtype=torch.float32)
    store_trees(tree, chances, slots, *waiting, meta(b, n - 1, dtype=long))
    starts = Starts.allocate(s, "meta")
    kept = meta(s), meta(s, 1, dtype=long), meta(s, dtype=torch.float32)
    gather_starts(starts, slots, *kept, meta(s, dtype=long))
    packed = meta(8 * b + 4 * (b + 1))
    sizes, scheduled, counts = packed[: 8 * b].view(8, b).split([4, 1, 3])
    cu_verified, cu_window, cu_fed, _ = packed[8 * b :].view(4, b + 1).unbind(0)
    given = waiting[2], slots, scheduled[0], b, b
    rank_nodes(*given, meta(s + 1), counts, cu_verified, cu_fed)
    rows = meta(3, s * t, dtype=long).unbind(0)
    feed_trees(
        FedTrees(meta(4, s, t), *meta(4, s).unbind(0), meta(8192, dtype=long)),
        LogitsRows(*rows, meta(s * t)),
        columns,
        num_nodes,
        slots,
        meta(b + 1),
        meta(b),
        meta(b * t),
        meta(s, 1, dtype=long),
        counts,
        sizes[1],
        cu_verified,
        cu_window,
        num_trees=b,
    )


def server(batches: list[int]) -> None:
    """Steps of one server as requests come and go, the first one its warm-up."""
    params = LookaheadParams(15, 5, 15)
    ops = TritonOps(params, max(batches), "meta", max_tokens=MAX_BLOCKS * 16)
    pages = BlockPages.allocate(NUM_BLOCKS, 16, params, "meta")
    cache = meta(NUM_BLOCKS, 16, 8, 256, dtype=torch.bfloat16)
    ops.warm_up(pages, meta(4, MAX_BLOCKS), [cache] * 32)
    for b in batches:
        step(params, 16, b, ops)


def move(dtype: torch.dtype, shape: tuple[int, ...], heads_first: bool) -> None:
    cache = meta(*shape, dtype=dtype)
    cache = cache.transpose(1, 2) if heads_first else cache
    verdict = Verdict(meta(4, 5), meta(4, 5), meta(4))
    (group,) = LayerCaches.group([cache])
    compact(group, some_batch(4), verdict, 16)


def ranked(dtype: torch.dtype) -> None:
    said = meta(7, NUM_ANSWERS), meta(7, NUM_ANSWERS, dtype=torch.float32)
    likeliest_tokens(meta(7, 50_257, dtype=dtype), *said)


def cases() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for name, (sizes, block_size, b) in SERVERS.items():
        params = LookaheadParams(*sizes)
        found[name] = lambda p=params, s=block_size, b=b: step(p, s, b)
    shared = LookaheadParams(0, 9, 32, 64)
    found["behind-others"] = lambda: step(shared, 16, 8, before=meta(8))
    for dtype in (torch.float32, torch.float16):
        found[f"logits-{dtype}"] = lambda dtype=dtype: ranked(dtype)
    found["server"] = lambda: server([1, 2, 3, 5, 16, 17, 250, 256])
    for name, cache in CACHES.items():
        found[name] = lambda cache=cache: move(*cache)
    return found
