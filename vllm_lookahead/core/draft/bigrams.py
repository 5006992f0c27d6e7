# SPDX-License-Identifier: Apache-2.0
"""The model's bigrams: what it says after each token, behind BOS or a comma.

The pages know only what the request has seen. Of all else the model itself was asked: a
table made once when it is loaded, that holds nothing of any request (Stewart et al.
2024, "The N-Grammys", model-derived bigrams).
"""

from collections.abc import Callable

import torch

from vllm_lookahead.core.pages import EMPTY

NUM_SUCCESSORS = 16  # kept of a token


def model_bigrams(
    likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    vocab_size: int,
    limit: int,
    chunk: int,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the model for the successors of each token.

    Args:
        likeliest: [n] int64 tokens to log-probabilities and ids of the likeliest next
            ones, both [n, NUM_SUCCESSORS], as `Tensor.topk` gives them.
        vocab_size: V.
        limit: most tokens to ask for. The first of a vocabulary built by merges are
            the most frequent ones.
        chunk: most tokens asked for at once.

    Returns:
        bigrams: [V, NUM_SUCCESSORS] int32, the likeliest first; EMPTY beyond `limit`.
        logprobs: [V, NUM_SUCCESSORS] float32, of them.
    """
    shape = vocab_size, NUM_SUCCESSORS
    bigrams = torch.full(shape, EMPTY, dtype=torch.int32, device=device)
    logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
    for tokens in torch.arange(min(limit, vocab_size), device=device).split(chunk):
        values, ids = likeliest(tokens)
        bigrams[tokens], logprobs[tokens] = ids.int(), values.float()
    return bigrams, logprobs
