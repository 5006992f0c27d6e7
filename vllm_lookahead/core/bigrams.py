# SPDX-License-Identifier: Apache-2.0
"""The model's bigrams: what it says after each token alone.

The pool knows only what the request has seen. Where it has nothing, or a chain
ends early, the model's own likeliest successors go on: a table of the model, made
once when it is loaded, that holds nothing of any request (Stewart et al. 2024, "The
N-Grammys", model-derived bigrams).
"""

from collections.abc import Callable

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.pool import BIGRAM

# Successors kept of a token: that many chains may start where the pool has none.
# Tokens per step of a 5M model at temperature 0.8, HumanEval, GSM8K and MT-Bench: the
# pool's chain alone 1.45, 1.60, 1.46; one chain with bigrams 1.55, 1.79, 1.64; seven
# nodes with four successors each 1.73, 2.00, 1.78.
NUM_SUCCESSORS = 4


def model_bigrams(
    likeliest: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    limit: int,
    chunk: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Ask the model for the successors of each token.

    Args:
        likeliest: [n] int64 tokens to the [n, NUM_SUCCESSORS] likeliest next ones.
        vocab_size: V.
        limit: most tokens to ask for. The first of a vocabulary built by merges are
            the most frequent ones.
        chunk: most tokens asked for at once.

    Returns:
        [V, NUM_SUCCESSORS] int32, the likeliest first; EMPTY beyond `limit`.
    """
    shape = vocab_size, NUM_SUCCESSORS
    table = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
    for tokens in torch.arange(min(limit, vocab_size), device=device).split(chunk):
        table[tokens] = likeliest(tokens).int()
    return table


def complete(
    candidates: torch.Tensor,
    context: torch.Tensor,
    batch: RequestBatch,
    chain_length: torch.Tensor,
    bigrams: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start chains at the root's successors, and go on where chains end early.

    Args:
        candidates: [B, G, K] int32 chains from the pool, EMPTY beyond a chain's end.
        context: [B, G] int32, EMPTY where the pool has no more.
        batch: B requests.
        chain_length: [NUM_ORIGINS, G] int32, as in `pool.lookup`.
        bigrams: [V, R] int32, as `model_bigrams` makes it.

    Returns:
        candidates, context: completed; of a chain that no pool entry began, the
            context is BIGRAM.
    """
    num_chains, num_values = candidates.shape[1:]
    vocab_size, successors = bigrams.shape
    rank = torch.arange(num_chains, device=candidates.device)
    nth = rank - (context >= 0).sum(1)[:, None]  # [B, G]
    begins = (nth >= 0) & (nth < successors)
    begins &= rank < batch.verification_set_size[:, None]
    context = context.masked_fill(begins, BIGRAM)
    length = chain_length[context.clamp(min=0).long(), rank].where(context >= 0, 0)
    length = length.minimum(batch.ngram_size[:, None] - 1)

    last, column = batch.root[:, None].long(), nth.where(begins, 0)
    out = []
    for i in range(num_values):
        known = (last >= 0) & (last < vocab_size) & (i < length)
        following = bigrams[last.clamp(0, vocab_size - 1), column].where(known, EMPTY)
        token = candidates[..., i].where(candidates[..., i] != EMPTY, following)
        last, column = token.long(), torch.zeros_like(column)
        out.append(token)
    return torch.stack(out, -1), context
