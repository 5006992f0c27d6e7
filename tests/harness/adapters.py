# SPDX-License-Identifier: Apache-2.0
"""Tiny LoRA adapters for `make_model`, with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.harness.models import VOCAB_SIZE

RANK = 8


def make_adapter(path: Path, seed: int, std: float = 0.1) -> Path:
    """Of attention, MLP and head, and strong enough to change the text."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "self_attn.q_proj": (64, 128),
        "self_attn.v_proj": (64, 64),
        "mlp.down_proj": (128, 64),
    }
    modules = {f"model.layers.{i}.{k}": v for i in range(2) for k, v in sizes.items()}
    modules["lm_head"] = 64, VOCAB_SIZE
    weights = {}
    for module, (inputs, outputs) in modules.items():
        for side, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items():
            weight = std * torch.randn(shape, generator=generator)
            weights[f"base_model.model.{module}.lora_{side}.weight"] = weight
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4 * RANK,
        "target_modules": sorted({module.split(".")[-1] for module in modules}),
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
