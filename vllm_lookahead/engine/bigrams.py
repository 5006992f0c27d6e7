# SPDX-License-Identifier: Apache-2.0
"""Ask a model in vLLM for its bigrams, once, before it serves."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_lookahead.core.bigrams import NUM_SUCCESSORS, model_bigrams

logger = init_logger("vllm.lookahead")


@dataclass
class LoneTokens:
    """Attention metadata of sequences that are one token long: no cache is read.

    Attributes:
        follows_bos: whether row 0 is a token that every other row follows.
    """

    follows_bos: bool

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Each row over itself and, if there is one, over row 0.

        Args:
            query: [n, num_heads, head_size].
            key, value: [n, num_kv_heads, head_size].
            output: of n * num_heads * head_size elements, written.
            scale: softmax scale.
        """
        group = query.shape[1] // key.shape[1]
        attended = value.float().repeat_interleave(group, 1)
        if self.follows_bos:
            keys = key.float().repeat_interleave(group, 1)
            to_self = (query.float() * keys).sum(-1, keepdim=True)
            to_first = (query.float() * keys[:1]).sum(-1, keepdim=True)
            share = torch.sigmoid((to_self - to_first) * scale)
            attended = attended.lerp(attended[:1], 1 - share)
        output.view(query.shape).copy_(attended)
        return output


@torch.inference_mode()
def ask_model(
    model: Any, vllm_config: VllmConfig, device: torch.device, max_flops: float
) -> torch.Tensor | None:
    """The table that `core.bigrams.complete` takes.

    Args:
        model: loaded, its attention layers taught to read `LoneTokens`.
        vllm_config: the runner's.
        device: of the model.
        max_flops: floating-point operations to spend; the first tokens of the
            vocabulary come first.

    Returns:
        [V, NUM_SUCCESSORS] int32; None for a model that takes no token ids.
    """
    if vllm_config.model_config.is_multimodal_model:
        return None
    start = time.perf_counter()
    prefix = _prefix(vllm_config.model_config).to(device)
    metadata: Any = LoneTokens(follows_bos=len(prefix) > 0)

    def likeliest(tokens: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([prefix, tokens])
        positions = torch.full_like(ids, len(prefix))
        positions[: len(prefix)] = 0
        with set_forward_context(metadata, vllm_config, num_tokens=len(ids)):
            hidden = model(
                input_ids=ids.int(),  # as the runners', for which it was compiled
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = model.compute_logits(hidden[len(prefix) :])
        return logits.topk(NUM_SUCCESSORS).indices

    vocab_size = vllm_config.model_config.get_vocab_size()
    per_token = 2 * sum(weight.numel() for weight in model.parameters())
    limit = min(vocab_size, int(max_flops / per_token))
    chunk = min(512, vllm_config.scheduler_config.max_num_batched_tokens - 1)
    table = model_bigrams(likeliest, vocab_size, limit, chunk, device)
    logger.info(
        "Asked the model for what follows %d of its %d tokens in %.1f s.",
        limit,
        vocab_size,
        time.perf_counter() - start,
    )
    return table


def _prefix(model_config: ModelConfig) -> torch.Tensor:
    """The token, if any, that this model's prompts begin with."""
    ids: list[int] = []
    if not model_config.skip_tokenizer_init:
        tokenizer = cached_tokenizer_from_config(model_config)
        ids = [t for t in tokenizer.encode("")[:1] if t == tokenizer.bos_token_id]
    return torch.tensor(ids, dtype=torch.int64)
