# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, made on the spot. They babble and loop."""

from pathlib import Path

VOCAB_SIZE = 128


def make_model(
    path: Path, seed: int, num_kv_heads: int, std: float = 0.08, head_size: int = 32
) -> Path:
    """A Llama of two layers, with a tokenizer of one token per character."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        max_position_embeddings=512,
        initializer_range=std,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return make_tokenizer(path)


def make_tokenizer(path: Path) -> Path:
    """One token per character."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteFallback, Fuse, Sequence
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *map(chr, range(32, 127))]
    pieces += [f"<{i}>" for i in range(len(pieces), VOCAB_SIZE)]
    tokenizer = Tokenizer(WordLevel({p: i for i, p in enumerate(pieces)}, " "))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])  # llguidance knows it
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path
