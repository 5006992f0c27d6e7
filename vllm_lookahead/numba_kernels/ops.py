# SPDX-License-Identifier: Apache-2.0
"""The operations of a lookahead step in Numba: what a CPU runs."""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.estimate import Hints
from vllm_lookahead.core.draft.forest import NUM_BINS, Worth
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.numba_kernels import (
    answers,
    attention,
    compact,
    draft,
    forest,
    mask,
    update,
    verify,
    write,
)
from vllm_lookahead.numba_kernels.answers import likeliest_tokens
from vllm_lookahead.numba_kernels.layout import INDEX, feed_trees, lay_out, size_trees
from vllm_lookahead.numba_kernels.walk import Walk
from vllm_lookahead.params import LookaheadParams


class NumbaOps:
    """On CPU tensors, with the results of `core.reference`."""

    write_tokens = staticmethod(write.write_tokens)
    draft = staticmethod(draft.draft)
    ancestors = staticmethod(mask.ancestors)
    verify = staticmethod(verify.verify)
    compact = staticmethod(compact.compact)
    update = staticmethod(update.update)
    keep_answers = staticmethod(answers.keep_answers)


def warm_up(
    params: LookaheadParams, block_size: int, caches: Sequence[torch.Tensor] = ()
) -> None:
    """Compile every kernel, or load it from Numba's cache, before the first step.

    Args:
        params: sizes to try.
        block_size: tokens per block.
        caches: as `compact` will get them: the kernel that moves their K/V depends
            on dtype and layout. Nothing in them changes.
    """
    ops = NumbaOps()
    pages = BlockPages.allocate(1, block_size, params)

    def one(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    batch = RequestBatch(
        block_table=one(0)[None],
        position=one(1),
        root=one(0),
        window_size=one(params.window_size),
        ngram_size=one(params.ngram_size),
        verification_set_size=one(params.verification_set_size),
        max_nodes=one(params.max_tree_size),
    )
    ops.write_tokens(pages, torch.tensor([0, 1]), torch.tensor([0, 0]))
    hints = Hints(
        bigrams=one(0)[:0, None],
        bigram_logprobs=torch.zeros(0, 0),
        temperature=torch.zeros(1),
        seeds=torch.zeros(1, params.ngram_size - 1, dtype=torch.int64),
        noise=cpu_noise,
        least=0.5,
    )
    tree, chances = ops.draft(pages, batch, hints, params.verification_set_size)
    bins, node_seconds = np.ones(NUM_BINS), np.ones(1 + chances.numel())
    forest.cut(tree, chances, Worth(bins, node_seconds, 0.0, 1.0))
    tree_rows = attention.TreeRows(
        np.zeros(1, np.int64),
        tree.num_nodes.numpy(),
        batch.position.numpy(),
        batch.block_table.numpy(),
        ops.ancestors(tree),
        tree.depths.numpy(),
        covers_batch=True,
    )
    size, lanes = tree.tokens.shape[1], attention.LANES
    query, blocks = torch.zeros(size, 1, lanes), -(-(1 + size) // block_size)
    cache = torch.zeros(1, 1, blocks * block_size, 2 * lanes)
    attention.tree_attention(query, cache, tree_rows, 1.0, query.clone())
    verdict = ops.verify(tree, torch.zeros_like(tree.tokens), params.ngram_size)
    forest.count_kept(chances, verdict, bins, bins.copy())
    ops.compact([], batch, verdict, block_size)
    slot = np.zeros((2, 1), np.int64)
    compact.move_slots(caches, *slot)
    ops.update(pages, batch, tree, tree.tokens, verdict)
    for dtype in (torch.bfloat16, torch.float32):
        said = likeliest_tokens(torch.zeros(size, 2, dtype=dtype))
        ops.keep_answers(pages, batch, tree, verdict, Answers(*said, one(0)))
    own = params.window_size, params.ngram_size, params.verification_set_size
    requests = np.array([(0, 1, *own, params.max_tree_size)])
    size_trees(requests, block_size, False)
    indices = requests[:, INDEX].copy()
    flat = lay_out(tree, batch, indices, np.ones(1, np.int64), block_size)
    Walk(tree, indices, flat, params.ngram_size).advance(np.zeros(1, np.int64))
    longs = [np.empty(size, np.int64) for _ in range(2)]
    ints = [np.empty(size + 1, np.int32) for _ in range(4)]
    table = batch.block_table.numpy()
    feed_trees(
        flat.fed, flat.start, batch.position.numpy(), table, size, ints[0], *longs,
        *ints[1:],
    )  # fmt: skip
