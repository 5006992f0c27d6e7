# SPDX-License-Identifier: Apache-2.0
"""The launches of tree attention that `test_attention_aot` compiles."""

from collections.abc import Callable
from functools import partial

import torch

from tests.kernels.aot_cases import meta
from vllm_lookahead.triton_kernels.attention import tree_attention, warm_up
from vllm_lookahead.triton_kernels.attention_config import SplitScratch, TreeBatch


def launch(
    head_size: int = 128,
    heads: tuple[int, int] = (32, 8),
    size: int = 120,
    requests: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = False,
    split: bool = False,
    prior: bool = False,
    **options,
) -> None:
    """K/V as vLLM's FlashAttention and Triton backends see it."""
    (hq, hkv), rows = heads, size * requests
    cache = meta(4096, 16, hkv, 2 * head_size, dtype=dtype)
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
        scale = meta(1, dtype=torch.float32)
        options |= {"k_scale": scale, "v_scale": scale}
    k_cache, v_cache = cache.split(head_size, -1)
    tree_attention(
        meta(rows, hq, head_size, dtype=dtype),
        k_cache,
        v_cache,
        TreeBatch(
            query_start_loc=meta(requests + 1),
            context_lens=meta(requests),
            block_table=meta(requests, 2048),
            ancestor_bits=meta(requests, size, -(-size // 32)),
            depths=meta(requests, size),
            max_query_len=size,
        ),
        meta(rows, hq, head_size, dtype=dtype),
        head_size**-0.5,
        scratch=SplitScratch.allocate(head_size, "meta", 10**6),
        num_splits=4 if split else 1,
        prior_lse=meta(hq, rows, dtype=torch.float32) if prior else None,
        **options,
    )


def server(requests_come: bool = True) -> None:
    """A server's warm-up, and its steps as requests come and go."""
    size, requests, (hq, hkv) = 120, 64, (32, 8)
    k_cache, v_cache = meta(4096, 16, hkv, 256, dtype=torch.bfloat16).chunk(2, -1)
    table, bits = meta(requests, 2048), meta(requests, size, -(-size // 32))
    scratch = SplitScratch.allocate(128, "meta")

    def attend(batch: TreeBatch, num_rows: int = 1) -> None:
        q, out = (meta(num_rows, hq, 128, dtype=torch.bfloat16) for _ in range(2))
        tree_attention(q, k_cache, v_cache, batch, out, 128**-0.5, scratch=scratch)

    def trees(b: int, longest_tree: int, longest_context: int) -> TreeBatch:
        return TreeBatch(
            query_start_loc=meta(b + 1),
            context_lens=meta(b),
            block_table=table[:b],
            ancestor_bits=bits[:b],
            max_query_len=longest_tree,
            max_context_len=longest_context,
        )

    out = meta(1, hq, 128, dtype=torch.bfloat16)
    warm_up(attend, trees(1, size, 32768), out, hq // hkv, scratch)
    for b in (1, 2, 3, 7, 64) if requests_come else ():
        for longest_tree in (1, 3, 4, 5, 9, 16, 17, 61, 120):
            for longest_context in (100, 600, 3000, 32768):
                batch = trees(b, longest_tree, longest_context)
                attend(batch, min(b * longest_tree, 256))


def cases() -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for head_size in (64, 128):
        for size in (1, 8, 16, 120):  # times 4 heads: tiles of 16, 32, 64, 128 rows
            for split in (True, False):
                name = f"main-{head_size}-{size}{'-split' * split}"
                found[name] = partial(launch, head_size, size=size, split=split)
        for split in (True, False):
            found[f"one-head-{head_size}{'-split' * split}"] = partial(
                launch, head_size, (32, 32), split=split
            )
        found[f"other-{head_size}-prior"] = partial(launch, head_size, prior=True)
    for head_size in (80, 96, 256):
        for size in (1, 16, 120):
            name = f"other-{head_size}-{size}"
            found[name] = partial(launch, head_size, size=size, split=True)
    found["other-float16"] = partial(launch, dtype=torch.float16)
    found["other-seven-heads"] = partial(launch, heads=(28, 4))
    found["other-soft-cap"] = partial(launch, softcap=30.0)
    found["other-window"] = partial(launch, sliding_window=1024)
    found["gemma-256"] = partial(launch, 256, softcap=50.0, sliding_window=4096)
    found["warm-up"] = partial(server, requests_come=False)
    found["server"] = server
    for size in (1, 120):
        found[f"fp8-{size}"] = partial(launch, size=size, fp8=True, split=True)
    return found
