# SPDX-License-Identifier: Apache-2.0
"""The model is asked for its bigrams; that they are drafted is in test_draft.py."""

import torch

from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS, model_bigrams
from vllm_lookahead.core.pages import EMPTY


def test_the_model_is_asked_in_chunks_for_the_first_tokens():
    asked = []

    def likeliest(tokens):
        asked.append(tokens.tolist())
        ids = tokens[:, None] + torch.arange(NUM_SUCCESSORS)
        return -ids / 2, ids

    bigrams, logprobs = model_bigrams(likeliest, vocab_size=10, limit=5, chunk=2)
    assert asked == [[0, 1], [2, 3], [4]]
    assert bigrams.dtype == torch.int32 and bigrams.shape == (10, NUM_SUCCESSORS)
    assert bigrams[4, :4].tolist() == [4, 5, 6, 7]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[:5], -bigrams[:5] / 2)
    assert (bigrams[5:] == EMPTY).all()
