# SPDX-License-Identifier: Apache-2.0
"""The kernels of a lookahead step other than attention, each as a call."""

from collections.abc import Callable

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.bigrams import NUM_SUCCESSORS
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.pool import NUM_ORIGINS
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.mask import build_mask
from vllm_lookahead.triton_kernels.ops import TritonOps

VOCAB = 5000


def text(*shape: int, device: str, vocab: int = VOCAB) -> torch.Tensor:
    """Tokens as frequent as words are: the n-th most common, one in n."""
    weight = 1 / torch.arange(1.0, vocab + 1, device=device)
    count = torch.Size(shape).numel()
    return torch.multinomial(weight, count, replacement=True).int().view(shape)


def make_state(
    params: LookaheadParams, requests: int, context: int, block_size: int, device: str
) -> tuple[BlockPages, RequestBatch]:
    """Requests in the middle of a generation, the last half of the text harvested."""
    per_request = (context + params.max_tree_size) // block_size + 1
    num_blocks = requests * per_request
    pages = BlockPages.allocate(num_blocks, block_size, params, device)
    pages.tokens.copy_(text(*pages.tokens.shape, device=device))
    table = torch.randperm(num_blocks, device=device).view(requests, per_request)
    if params.window_size:
        harvested = table[:, per_request // 2 :]
        ring = pages.ring[harvested]
        pages.ring[harvested] = text(*ring.shape, device=device)
        pages.ring_count[harvested] = ring.shape[-2]
        pages.window.copy_(text(*pages.window.shape, device=device))

    def column(value: int) -> torch.Tensor:
        return torch.full((requests,), value, dtype=torch.int32, device=device)

    batch = RequestBatch(
        block_table=table.int(),
        position=column(context),
        root=text(requests, device=device),
        window_size=column(params.window_size),
        ngram_size=column(params.ngram_size),
        verification_set_size=column(params.verification_set_size),
        max_nodes=column(params.max_tree_size),
    )
    return pages, batch


def step_calls(
    params: LookaheadParams,
    requests: int,
    context: int,
    block_size: int,
    caches: list[torch.Tensor],
    device: str,
) -> dict[str, Callable[[], object]]:
    """Each kernel of a step as a call that can be repeated.

    Args:
        caches: [num_blocks, block_size, heads, width] of each layer; compaction
            is left out where they hold fewer blocks than the requests.
    """
    pages, batch = make_state(params, requests, context, block_size, device)
    ops = TritonOps(params, requests, device)
    n, g, t = params.ngram_size, params.verification_set_size, params.max_tree_size
    longest = torch.full((NUM_ORIGINS, g), n - 1, dtype=torch.int32, device=device)
    bigrams = torch.randint(0, VOCAB, (VOCAB, NUM_SUCCESSORS), device=device).int()
    tree = ops.propose(pages, batch, longest, bigrams)
    sampled = torch.zeros(requests, t, dtype=torch.int64, device=device)
    last = min(n - 1, t - 1)
    sampled[:, :last] = tree.tokens[:, 1 : last + 1]  # the first chain is right
    verdict = ops.verify(tree, sampled, n)
    slots = batch.slots(batch.position[:, None], block_size)[:, 0] | 1
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * t
    bits = torch.empty(requests, t, -(-t // 32), dtype=torch.int32, device=device)
    positions = torch.empty(requests * t, dtype=torch.int64, device=device)
    input_ids = torch.empty(requests * t, dtype=torch.int32, device=device)
    calls: dict[str, Callable[[], object]] = {
        "write_tokens": lambda: ops.write_tokens(pages, slots, batch.root),
        "propose": lambda: ops.propose(pages, batch, longest, bigrams),
        "mask": lambda: build_mask(
            tree, batch.position, starts, bits, positions, input_ids
        ),
        "verify": lambda: ops.verify(tree, sampled, n),
        "compact": lambda: ops.compact(caches, batch, verdict, block_size),
        "update": lambda: ops.update(pages, batch, tree, sampled, verdict),
    }
    if caches[0].shape[0] < pages.tokens.shape[0]:
        del calls["compact"]
    return calls
