# SPDX-License-Identifier: Apache-2.0
"""Model folders with a config and no weights."""

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def write_config(folder: Path, **changes: Any) -> str:
    """Write a tiny Llama's config with some keys changed; return the folder."""
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    return str(folder)
