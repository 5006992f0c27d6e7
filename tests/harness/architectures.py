# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many architectures with random weights, from `transformers` configs.

Each has the vocabulary of `models.make_model`, and prompts of token ids only.
"""

from pathlib import Path
from typing import Any

try:
    from models import VOCAB_SIZE, make_tokenizer
except ImportError:  # imported as a part of tests
    from tests.harness.models import VOCAB_SIZE, make_tokenizer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 64,
}
SLIDING, FULL = "sliding_attention", "full_attention"
# By the name of a `transformers` class of causal language models: what differs.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "DeepseekV2ForCausalLM": LATENT | {"topk_method": "greedy"},
    "DeepseekV3ForCausalLM": LATENT | {"topk_method": "noaux_tc"},
    "Gemma2ForCausalLM": {
        "sliding_window": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    },
    "Gemma3ForCausalLM": {
        "sliding_window": 32,
        "query_pre_attn_scalar": 32,
        "layer_types": [SLIDING, FULL],
        "tie_word_embeddings": True,
    },
    "MistralForCausalLM": {"sliding_window": 32},
    "GptOssForCausalLM": {
        "sliding_window": 32,
        "layer_types": [SLIDING, FULL],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": None,
    },
    "Llama4ForCausalLM": {
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "attention_chunk_size": 128,
        "layer_types": ["chunked_attention", FULL],
        "no_rope_layers": [1, 0],
        "moe_layers": [1],
        "interleave_moe_layer_step": 2,
    },
    "BloomForCausalLM": {
        "hidden_size": 128,
        "n_head": 4,
        "n_layer": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3NextForCausalLM": {
        "layer_types": ["linear_attention", FULL],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "GraniteMoeHybridForCausalLM": {
        "hidden_size": 128,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "position_embedding_type": "rope",
    },
    "Lfm2ForCausalLM": {
        "hidden_size": 128,
        "layer_types": ["conv", FULL],
        "block_ff_dim": 128,
        "conv_dim": 128,
        "block_dim": 128,
    },
}


def make_architecture(path: Path, name: str, seed: int = 0, std: float = 0.08) -> Path:
    """A model of one of `ARCHITECTURES`, with the tokenizer of `make_model`."""
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    options = COMMON | ARCHITECTURES[name] | {"initializer_range": std}
    config = kind.config_class(**options)
    model = kind(config)
    model.save_pretrained(path)
    return make_tokenizer(path)
