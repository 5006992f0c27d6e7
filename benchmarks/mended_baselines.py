# SPDX-License-Identifier: Apache-2.0
"""A worker extension without which vLLM 0.32's own methods cannot sample on a CPU.

Its rejection sampler expands temperatures, top-k and top-p from requests to draft
tokens. On a CPU `_expand_kernel_impl` writes them into an int64 copy, and what the
sampler then divides logits by is uninitialised memory: next to no draft is accepted.
`ngram` and `suffix` are measured with the expansion mended.
"""

import torch
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """As upstream documents it: [batch_size] to [num_tokens]."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts)


class WorkerExtension:
    """Nothing to add: importing this module in a worker is what mends it."""


rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
