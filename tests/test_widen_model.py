# SPDX-License-Identifier: Apache-2.0
"""A widened model says what the small one says."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.widen_model import SOURCE, Shape, widen

SMALL = Shape(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=96,
)
WIDE = Shape(
    hidden_size=3 * 32,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=2 * 16,
    vocab_size=130,
)


def make_small(path: Path, **changes) -> Path:
    """With weights large enough for attention and MLP to matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **asdict(SMALL), initializer_range=0.3, rms_norm_eps=1e-3, **changes
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    model.save_pretrained(path)
    return path


def load(path: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def assert_same_function(small, wide, ids: torch.Tensor) -> None:
    expected, logits = small(ids).logits, wide(ids).logits
    vocab = expected.shape[-1]
    close = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(logits[..., :vocab], expected, rtol=0, atol=close)
    if logits.shape[-1] > vocab:
        # Far enough for a probability of exactly 0, at any sensible temperature.
        lowest = expected.min(-1, keepdim=True).values
        assert (logits[..., vocab:] < lowest - 1000).all()
        assert logits.isfinite().all()
    length = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    greedy = [m.generate(ids, pad_token_id=0, **length) for m in (small, wide)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "wide",
    [
        WIDE,
        replace(WIDE, num_attention_heads=4, num_key_value_heads=2),
        replace(SMALL, hidden_size=36),
    ],
    ids=["all", "grouped", "channel"],
)
def test_logits_and_tokens(tmp_path, wide, tied):
    source = make_small(tmp_path / "small", tie_word_embeddings=tied)
    widen(source, tmp_path / "wide", wide, torch.float32, log=lambda _: None)
    torch.manual_seed(1)
    ids = torch.randint(SMALL.vocab_size, (3, 40))
    assert_same_function(load(source), load(tmp_path / "wide"), ids)


def test_dead_channels_stay_zero_in_bf16(tmp_path):
    source = make_small(tmp_path / "small")
    widen(source, tmp_path / "wide", WIDE, log=lambda _: None)
    wide = load(tmp_path / "wide").bfloat16()
    ids = torch.randint(SMALL.vocab_size, (1, 40))
    states = wide(ids, output_hidden_states=True).hidden_states[:-1]  # before the norm
    assert len(states) == WIDE.num_hidden_layers
    for state in states:
        assert not state[..., SMALL.hidden_size : -1].any()
        assert (state[..., -1] == state[0, 0, -1]).all()
        assert state[0, 0, -1] > 0


def test_dead_weights_are_random(tmp_path):
    source = make_small(tmp_path / "small")
    widen(source, tmp_path / "wide", WIDE, log=lambda _: None)
    for layer in load(tmp_path / "wide").model.layers[SMALL.num_hidden_layers :]:
        attention, mlp = layer.self_attn, layer.mlp
        for read in (attention.q_proj, attention.k_proj, mlp.gate_proj, mlp.up_proj):
            assert 0.015 < read.weight.std() < 0.025
        for write in (attention.o_proj, mlp.down_proj):
            assert not write.weight.any()


def test_demo_model(tmp_path):
    """Trained weights, and the norm's scale of the real widening: a quarter."""
    small = load(SOURCE)
    wide = Shape(
        hidden_size=16 * 256,
        intermediate_size=720,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=4200,
    )
    widen(SOURCE, tmp_path, wide, torch.float32, log=lambda _: None)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 4096
    torch.manual_seed(1)
    assert_same_function(small, load(tmp_path), torch.randint(4096, (1, 60)))


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"head_dim": 24}, "head_dim"),
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
    ],
)
def test_a_shape_that_does_not_fit(tmp_path, changes, names):
    source = make_small(tmp_path / "small")
    with pytest.raises(ValueError, match=names):
        widen(source, tmp_path / "wide", replace(WIDE, **changes))
