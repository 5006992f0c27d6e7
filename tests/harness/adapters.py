# SPDX-License-Identifier: Apache-2.0
"""Tiny LoRA adapters for `make_model`, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def make_adapter(path: Path, seed: int, std: float = 0.1) -> Path:
    """Of every layer's attention and MLP, and strong enough to change the text."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "self_attn.q_proj": (64, 128),
        "self_attn.v_proj": (64, 64),
        "mlp.down_proj": (128, 64),
    }
    weights = {}
    for layer in range(2):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
                weight = std * torch.randn(shape, generator=generator)
                weights[f"{name}.lora_{side}.weight"] = weight
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4 * RANK,
        "target_modules": [module.split(".")[1] for module in sizes],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
