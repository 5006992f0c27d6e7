# SPDX-License-Identifier: Apache-2.0
"""The model's bigrams: what it says after each token alone.

The pool knows only what the request has seen. Where it has nothing, or a chain
ends early, the model's own likeliest successors go on: a table of the model, made
once when it is loaded, that holds nothing of any request (Stewart et al. 2024, "The
N-Grammys", model-derived bigrams).

A sampler whose noise is known beforehand says more: of the likely successors it will
pick the one that it adds the most noise to (Daliri et al. 2024, "Coupling without
Communication and Drafter-Invariant Speculative Decoding"). What is sampled stays what
it was; it is guessed better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.pool import BIGRAM

# Successors kept of a token: that many chains may start where the pool has none.
# Tokens per step of a 5M model at temperature 0.8, HumanEval, GSM8K and MT-Bench: the
# pool's chain alone 1.45, 1.60, 1.46; chains of 4, 2, 1 and 1 tokens with bigrams 1.73,
# 1.81, 1.72; with the sampler's noise over 4 successors 1.73, 1.85, 1.72, over 8 1.75,
# 1.86, 1.77, over 16 1.78, 1.86, 1.81.
NUM_SUCCESSORS = 16


@dataclass
class Draws:
    """How the sampler will pick: the largest logit / temperature + noise.

    Attributes:
        seeds: [B, N-1] int64, what the noise of the token at each depth is keyed by.
        temperature: [B] float32; without noise where it is 0.
        logits: [V, R] float32 of the successors, up to a constant for each token.
    """

    seeds: torch.Tensor
    temperature: torch.Tensor
    logits: torch.Tensor


def _splitmix64(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64 bits (Steele et al. 2014)."""

    def fold(z: torch.Tensor, shift: int) -> torch.Tensor:
        return z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))

    z = fold(z, 30) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = fold(z, 27) * (0x94D049BB133111EB - (1 << 64))
    return fold(z, 31)


def gumbel_noise(seeds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """What vLLM's CPU sampler adds to logits (`fused_gumbel_argmax`).

    Args:
        seeds, tokens: integers that broadcast against each other.

    Returns:
        float64.
    """
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    bits = _splitmix64(_splitmix64(seeds.long()) + (tokens.long() + 1) * gamma)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def model_bigrams(
    likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    vocab_size: int,
    limit: int,
    chunk: int,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the model for the successors of each token.

    Args:
        likeliest: [n] int64 tokens to logits and ids of the likeliest next ones, both
            [n, NUM_SUCCESSORS], as `Tensor.topk` gives them.
        vocab_size: V.
        limit: most tokens to ask for. The first of a vocabulary built by merges are
            the most frequent ones.
        chunk: most tokens asked for at once.

    Returns:
        bigrams: [V, NUM_SUCCESSORS] int32, the likeliest first; EMPTY beyond `limit`.
        logits: [V, NUM_SUCCESSORS] float32 of each.
    """
    shape = vocab_size, NUM_SUCCESSORS
    bigrams = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
    logits = torch.zeros(shape, dtype=torch.float32, device=device)
    for tokens in torch.arange(min(limit, vocab_size), device=device).split(chunk):
        values, ids = likeliest(tokens)
        bigrams[tokens], logits[tokens] = ids.int(), values.float()
    return bigrams, logits


def _ranked(
    last: torch.Tensor, depth: int, bigrams: torch.Tensor, draws: Draws | None
) -> torch.Tensor:
    """Successors of `last` [B, G], best first: [B, G, R]."""
    tokens = bigrams[last]
    if draws is None:
        return tokens
    temperature = draws.temperature[:, None, None].double()
    noise = gumbel_noise(draws.seeds[:, depth, None, None], tokens)
    score = draws.logits[last].double() / temperature + noise
    order = score.argsort(dim=-1, descending=True, stable=True)
    return tokens.gather(-1, order).where(temperature > 0, tokens)


def complete(
    candidates: torch.Tensor,
    context: torch.Tensor,
    batch: RequestBatch,
    chain_length: torch.Tensor,
    bigrams: torch.Tensor,
    draws: Draws | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start chains at the root's successors, and go on where chains end early.

    Args:
        candidates: [B, G, K] int32 chains from the pool, EMPTY beyond a chain's end.
        context: [B, G] int32, EMPTY where the pool has no more.
        batch: B requests.
        chain_length: [NUM_ORIGINS, G] int32, as in `pool.lookup`.
        bigrams: [V, R] int32, as `model_bigrams` makes it.
        draws: how the sampler will pick, where that is known; K depths of it.

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
        last = last.clamp(0, vocab_size - 1).expand(column.shape)
        ranked = _ranked(last, i, bigrams, draws)
        following = ranked.gather(-1, column[..., None])[..., 0].where(known, EMPTY)
        token = candidates[..., i].where(candidates[..., i] != EMPTY, following)
        last, column = token.long(), torch.zeros_like(column)
        out.append(token)
    return torch.stack(out, -1), context
