# SPDX-License-Identifier: Apache-2.0
"""A small Llama in the shape of a large one, without a change in what it says.

    python benchmarks/widen_model.py --source demo/model --output wide-model

A step of the result costs what a step of its shape costs, Llama-2-7B's by default,
and its text is the small model's: so is the share of drafts that it accepts. It is
no 7B model in anything but cost.

Added channels of the residual stream are zero, for nothing writes to them: `o_proj`
and `down_proj`, three tenths of a layer, are zero but for the small model's own part.
What only reads them, and what only dead heads, dead rows of the MLP and dead layers
compute, is random; the same in every layer. One added channel holds a constant c
that only the head reads: through it, added tokens get a logit far below all others.

    RMSNorm    sum(x^2) / H' + eps' = (sum(x^2) / H + eps) H / H', for c^2 is taken
               out of eps; the weight is scaled by sqrt(H / H')
    RoPE       pair i of d/2 goes to pair i D/d of D/2, which turns as fast
    softmax    its scale falls from d^-0.5 to D^-0.5; q is scaled up

In bf16 the scaled weights are rounded once more: sqrt(H / H') is exact from 256
channels to 4096, sqrt(D / d) is not.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

SOURCE = Path(__file__).resolve().parent.parent / "demo" / "model"
STD = 0.02  # of random weights
CONSTANT_LOGIT = 2.0**19  # of an added token: this, negative, over the last RMS


@dataclass(frozen=True)
class Shape:
    """Of the result; Llama-2-7B's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000


class Widening:
    """A small model's weights and a larger shape.

    Raises:
        ValueError: not a plain Llama, or it does not fit the shape.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, shape: Shape) -> None:
        self.config, self.weights, self.shape = config, weights, shape
        self.small = _shape_of(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        wrong = {
            "model_type": config["model_type"] != "llama",
            "attention_bias": config.get("attention_bias"),
            "mlp_bias": config.get("mlp_bias"),
            "rope_type": rope.get("rope_type", "default") != "default",
        }
        for name, value in asdict(self.small).items():
            # K/V heads may be fewer: each then serves more query heads.
            wrong[name] = name != "num_key_value_heads" and value > asdict(shape)[name]
        wrong["hidden_size"] |= shape.hidden_size == self.small.hidden_size
        wrong["head_dim"] |= shape.head_dim % self.small.head_dim != 0
        wrong["num_key_value_heads"] = self.group % self.shape_group != 0
        if names := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ValueError(
                f"cannot widen {self.small} to {shape}: {', '.join(names)}"
            )
        # A power of two, exact in any dtype, which leaves some of eps.
        budget = self.small.hidden_size * config["rms_norm_eps"] / 2
        self.constant = 2.0 ** math.floor(math.log2(budget) / 2)
        self.norm_scale = math.sqrt(self.small.hidden_size / shape.hidden_size)

    @property
    def group(self) -> int:
        return self.small.num_attention_heads // self.small.num_key_value_heads

    @property
    def shape_group(self) -> int:
        return self.shape.num_attention_heads // self.shape.num_key_value_heads

    def wide_config(self, dtype: torch.dtype) -> dict[str, Any]:
        eps = self.config["rms_norm_eps"] * self.small.hidden_size - self.constant**2
        name = str(dtype).removeprefix("torch.")
        old = {
            k: v for k, v in self.config.items() if k not in ("dtype", "torch_dtype")
        }
        return {
            **old,
            **asdict(self.shape),
            "rms_norm_eps": eps / self.shape.hidden_size,
            "tie_word_embeddings": False,
            "torch_dtype": name,
        }

    def dead_layer(self, dtype: torch.dtype, seed: int = 0) -> Weights:
        """A layer that adds nothing to the residual stream; names without prefix."""
        s, generator = self.shape, torch.Generator().manual_seed(seed)

        def random(rows: int) -> torch.Tensor:
            weight = torch.empty(rows, s.hidden_size, dtype=dtype)
            return weight.normal_(0, STD, generator=generator)

        def zeros(columns: int) -> torch.Tensor:
            return torch.zeros(s.hidden_size, columns, dtype=dtype)

        norm = torch.ones(s.hidden_size, dtype=dtype)
        norm[-1] = 0  # the constant
        heads, kv_heads = s.num_attention_heads, s.num_key_value_heads
        return {
            "input_layernorm.weight": norm,
            "self_attn.q_proj.weight": random(heads * s.head_dim),
            "self_attn.k_proj.weight": random(kv_heads * s.head_dim),
            "self_attn.v_proj.weight": random(kv_heads * s.head_dim),
            "self_attn.o_proj.weight": zeros(heads * s.head_dim),
            "post_attention_layernorm.weight": norm.clone(),
            "mlp.gate_proj.weight": random(s.intermediate_size),
            "mlp.up_proj.weight": random(s.intermediate_size),
            "mlp.down_proj.weight": zeros(s.intermediate_size),
        }

    def live_layer(self, index: int, dead: Weights) -> Weights:
        """Layer `index` of the small model, laid over a dead one."""
        layer = {name: weight.clone() for name, weight in dead.items()}
        small, wide = self.small, self.shape
        h, d = small.hidden_size, small.head_dim
        prefix = f"model.layers.{index}."

        def source(name: str) -> torch.Tensor:
            return self.weights[prefix + name].float()

        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            layer[name][:h] = source(name) * self.norm_scale
        name = "mlp.{}_proj.weight"
        for part in ("gate", "up"):
            weight = source(name.format(part))
            layer[name.format(part)][: len(weight), :h] = weight
        weight = source(name.format("down"))
        layer[name.format("down")][:h, : weight.shape[1]] = weight

        name = "self_attn.{}_proj.weight"

        def rows(part: str) -> tuple[torch.Tensor, torch.Tensor]:
            """Ours by head, a view: [heads, D, H']; and the small model's."""
            ours = layer[name.format(part)].unflatten(0, (-1, wide.head_dim))
            return ours, source(name.format(part)).unflatten(0, (-1, d))

        pair = torch.arange(d // 2) * (wide.head_dim // d)
        turned = torch.cat([pair, pair + wide.head_dim // 2])
        q, q_source = rows("q")
        q[: small.num_attention_heads] = 0  # or dead dimensions would be scored
        scale = math.sqrt(wide.head_dim / d)
        q[: small.num_attention_heads, turned, :h] = (q_source * scale).to(q.dtype)
        # Each of the small model's K/V heads serves as many query heads as before.
        copies = self.group // self.shape_group
        for part, at in (("k", turned), ("v", torch.arange(d))):
            ours, theirs = rows(part)
            theirs = theirs.repeat_interleave(copies, 0)
            ours[: len(theirs), at, :h] = theirs.to(ours.dtype)
        o = layer[name.format("o")].unflatten(1, (-1, wide.head_dim))
        o_source = source(name.format("o")).unflatten(1, (-1, d))
        o[:h, : small.num_attention_heads, :d] = o_source
        return layer

    def ends(self, dtype: torch.dtype, seed: int = 1) -> Weights:
        """Embedding, last norm and head."""
        small, wide = self.small, self.shape
        h, vocab = small.hidden_size, small.vocab_size
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.zeros(wide.vocab_size, wide.hidden_size, dtype=dtype)
        source = self.weights["model.embed_tokens.weight"]
        embedding[:vocab, :h] = source
        embedding[:, -1] = self.constant
        norm = torch.ones(wide.hidden_size, dtype=dtype)
        norm[:h] = self.weights["model.norm.weight"].float() * self.norm_scale
        norm[-1] = 32 / self.constant
        head = torch.empty_like(embedding).normal_(0, STD, generator=generator)
        head[:, :h] = 0
        head[:vocab, :h] = self.weights.get("lm_head.weight", source)
        head[:vocab, -1] = 0
        head[vocab:, -1] = -CONSTANT_LOGIT / 32
        return {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": norm,
            "lm_head.weight": head,
        }


def _shape_of(config: dict[str, Any]) -> Shape:
    known = {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
    known |= {k: v for k, v in config.items() if v is not None}
    return Shape(**{field.name: known[field.name] for field in fields(Shape)})


def widen(
    source: Path,
    output: Path,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.bfloat16,
    log: Callable[[str], None] = print,
) -> None:
    """Write the widened model, a layer per file; `config.json` comes last.

    No more than two layers are held in memory, besides the small model.

    Args:
        source: folder of a Llama in safetensors.
        output: folder, made if need be.
        shape: Llama-2-7B's by default.
        dtype: of the weights written.
        log: takes a line per file.

    Raises:
        ValueError: as `Widening`.
    """
    shape = shape or Shape()
    config = json.loads((source / "config.json").read_text())
    weights: Weights = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= load_file(path)
    widening = Widening(config, weights, shape)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").unlink(missing_ok=True)
    files = shape.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    total = 0

    def save(tensors: Weights) -> None:
        nonlocal total
        number = len(set(weight_map.values())) + 1
        file = f"model-{number:05}-of-{files:05}.safetensors"
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        log(f"{file}, {total / 1e9:.1f} GB so far")

    dead = widening.dead_layer(dtype)
    for index in range(shape.num_hidden_layers):
        live = index < widening.small.num_hidden_layers
        layer = widening.live_layer(index, dead) if live else dead
        save({f"model.layers.{index}.{name}": w for name, w in layer.items()})
    del dead, layer
    save(widening.ends(dtype))
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(output / "model.safetensors.index.json", index_file)
    for pattern in ("tokenizer*", "special_tokens_map.json", "generation_config.json"):
        for path in source.glob(pattern):
            shutil.copyfile(path, output / path.name)
    (output / "README.md").write_text(describe(widening) + "\n")
    _write_json(output / "config.json", widening.wide_config(dtype))


def describe(widening: Widening) -> str:
    """What the model is, for whoever finds it or reads of its speed."""
    small = ", ".join(f"{k} {v}" for k, v in asdict(widening.small).items())
    wide = ", ".join(f"{k} {v}" for k, v in asdict(widening.shape).items())
    return (
        f"A small trained Llama ({small}) widened to another shape ({wide}) without a "
        "change in its function: extra layers, heads and channels are computed and "
        "come to nothing. It costs what a model of its shape costs and writes the "
        "small model's text. It knows no more than the small model does."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--output", type=Path, required=True)
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0])
    for field in fields(Shape):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default)
    args = parser.parse_args()
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    widen(args.source, args.output, shape, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
