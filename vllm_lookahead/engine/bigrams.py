# SPDX-License-Identifier: Apache-2.0
"""Ask a model in vLLM for its bigrams, once, before it serves."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_world_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS, model_bigrams

logger = init_logger("vllm.lookahead")

# What a server may spend before it starts. The 128k tokens of a 7B model are 2e15
# floating-point operations: all of them on a GPU, the first ones on a CPU.
_MAX_SECONDS = 15.0
# Tokens at once: their logits must fit beside the K/V cache.
_ROWS = 128
# A text's first token draws attention whatever it is, so a model that is asked about a
# token alone says little of it. Where prompts begin with no token of their own, this
# one comes first. SmolLM2-135M-Instruct, the next tokens of three answers of 64: 0.5%
# of them are the likeliest after the token alone, 8% after BOS and 14% after a comma;
# 29%, 40% and 48% are among the 16 likeliest.
COMMA = ","


@dataclass
class LoneTokens:
    """Attention metadata of sequences that are one token long: no cache is read.

    Attributes:
        follow_first: whether row 0 is a token that every other row follows.
    """

    follow_first: bool

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
        if self.follow_first:
            keys = key.float().repeat_interleave(group, 1)
            to_self = (query.float() * keys).sum(-1, keepdim=True)
            to_first = (query.float() * keys[:1]).sum(-1, keepdim=True)
            share = torch.sigmoid((to_self - to_first) * scale)
            attended = attended.lerp(attended[:1], 1 - share)
        output.view(query.shape).copy_(attended)
        return output


@torch.inference_mode()
def ask_model(
    model: Any, vllm_config: VllmConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The tables that `core.draft.estimate.Hints` has.

    Args:
        model: loaded, its attention layers taught to read `LoneTokens`.
        vllm_config: the runner's.
        device: of the model.

    Returns:
        bigrams and their log-probabilities, as `core.draft.bigrams.model_bigrams`, the
        same on every rank; None for a model that needs more than token ids and
        positions.
    """
    config = vllm_config.model_config
    layers: Any = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    needs_more = (
        not all(isinstance(x, Attention) for x in layers.values())  # MLA, recurrent
        or config.uses_mrope
        or config.is_multimodal_model
        or config.enable_prompt_embeds  # compiled for embeddings alone
        or vllm_config.lora_config is not None
        or vllm_config.parallel_config.enable_eplb
    )
    if needs_more:
        return None
    start = time.perf_counter()
    prefix = _prefix(config).to(device)
    metadata: Any = LoneTokens(follow_first=len(prefix) > 0)
    rows = min(_ROWS, vllm_config.scheduler_config.max_num_batched_tokens)
    chunk = rows - len(prefix)

    def likeliest(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padding = tokens.new_zeros(chunk - len(tokens))
        ids = torch.cat([prefix, tokens, padding])
        positions = torch.full_like(ids, len(prefix))
        positions[: len(prefix)] = 0
        with set_forward_context(metadata, vllm_config, num_tokens=rows):
            hidden = model(
                input_ids=ids.int(),  # as the runners', for which it was compiled
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        logits = model.compute_logits(hidden[len(prefix) :][: len(tokens)])
        values, ids = logits.float().log_softmax(-1).topk(NUM_SUCCESSORS)
        return values, ids

    vocab_size = config.get_vocab_size()
    limit = _affordable(likeliest, min(chunk, vocab_size), device)
    tables = model_bigrams(likeliest, vocab_size, limit, chunk, device)
    logger.info(
        "Asked the model what follows each of %d tokens, of %d, in %.1f s.",
        min(limit, vocab_size),
        vocab_size,
        time.perf_counter() - start,
    )
    return tables


def _affordable(
    likeliest: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    chunk: int,
    device: torch.device,
) -> int:
    """How many tokens take _MAX_SECONDS, by the slowest rank's clock."""
    tokens = torch.arange(chunk, device=device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        likeliest(tokens)[1].cpu()
        seconds = time.perf_counter() - start
    limit = torch.tensor(max(1, int(_MAX_SECONDS / seconds)) * chunk)
    group = get_world_group()
    if group.world_size > 1:
        torch.distributed.all_reduce(
            limit, torch.distributed.ReduceOp.MIN, group.cpu_group
        )
    return int(limit)


def _prefix(model_config: ModelConfig) -> torch.Tensor:
    """What tokens follow when they are asked for: what prompts begin with, or COMMA.

    Returns:
        [1] int64, or [0] where there is no tokenizer to ask.
    """
    ids: list[int] = []
    if not model_config.skip_tokenizer_init:
        try:
            tokenizer = cached_tokenizer_from_config(model_config)
            ids = [t for t in tokenizer.encode("")[:1] if t == tokenizer.bos_token_id]
            ids = ids or tokenizer.encode(COMMA, add_special_tokens=False)[:1]
        except Exception as error:  # a tokenizer of the model's own; nothing is lost
            logger.warning("Bigrams are taken without a first token: %s", error)
    return torch.tensor(ids, dtype=torch.int64)
