# SPDX-License-Identifier: Apache-2.0
"""Train the small Python-code model that the demo and the benchmarks run.

The corpus is Python source that is already on the machine: the standard library
of the running interpreter and a short list of permissively licensed packages,
each used if installed.  About 2% of the standard library's files are held out.
The model has the Llama architecture and is written as a Hugging Face folder that
transformers and vLLM load as ``LlamaForCausalLM``.  Training runs for a wall-clock
budget: the learning rate falls linearly with the share of the budget used.

    python demo/train_model.py --out demo/model --minutes 65 --threads 2
"""

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import TEST_WEIGHT, corpus_table, gather, train_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

BOS, EOS = 0, 1


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    """One Llama layer; parameter names are those of the Hugging Face model."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        self.dim = c["head_dim"]
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        sizes = {
            "q_proj": (hidden, self.heads * self.dim),
            "k_proj": (hidden, self.kv * self.dim),
            "v_proj": (hidden, self.kv * self.dim),
            "o_proj": (self.heads * self.dim, hidden),
        }
        mlp = {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        self.self_attn, self.mlp = (
            nn.ModuleDict({k: nn.Linear(*v, bias=False) for k, v in d.items()})
            for d in (sizes, mlp)
        )
        self.input_layernorm = RMSNorm(hidden)
        self.post_attention_layernorm = RMSNorm(hidden)
        for layer in (self.self_attn["o_proj"], self.mlp["down_proj"]):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        a, m = self.self_attn, self.mlp
        weight = torch.cat([a[k].weight for k in ("q_proj", "k_proj", "v_proj")])
        qkv = F.linear(self.input_layernorm(x), weight)
        qkv = qkv.view(b, t, -1, self.dim).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv, self.kv], 1)
        left, right = qk.chunk(2, -1)
        qk = qk * cos + torch.cat([-right, left], -1) * sin
        q, k = qk.split([self.heads, self.kv], 1)
        k, v = (s.repeat_interleave(self.heads // self.kv, 1) for s in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a["o_proj"](out.transpose(1, 2).reshape(b, t, -1))
        weight = torch.cat([m["gate_proj"].weight, m["up_proj"].weight])
        gate, up = F.linear(self.post_attention_layernorm(x), weight).chunk(2, -1)
        return x + m["down_proj"](F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        dim = c["head_dim"]
        rates = c["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(c["max_position_embeddings"]).float(), rates)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x, t = self.embed_tokens(ids), ids.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Muon:
    """Momentum whose update is orthogonalised, for the weight matrices of layers."""

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95) -> None:
        shapes = sorted({p.shape for p in params})
        self.groups = [[p for p in params if p.shape == s] for s in shapes]
        self.buffers = [torch.zeros(len(g), *g[0].shape) for g in self.groups]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float, decay: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group])
            buffer.lerp_(grad, 1 - self.momentum)
            x = grad.lerp(buffer, self.momentum)
            rows, columns = x.shape[1:]
            x = x.mT if rows > columns else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            x = x.mT if rows > columns else x
            scale = max(1.0, rows / columns) ** 0.5
            for p, update in zip(group, x, strict=True):
                p.mul_(1 - lr * decay).add_(update, alpha=-lr * scale)


def batches(
    ids: list[Tensor], weights: list[float], length: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled windows of whole files laid end to end, pass after pass."""
    rng = random.Random(seed)
    while True:
        order = []
        for i, weight in enumerate(weights):
            order += [i] * int(weight + rng.random())
        rng.shuffle(order)
        stream = torch.cat([ids[i] for i in order])
        windows = stream[rng.randrange(length) :].unfold(0, length + 1, length)
        for rows in torch.randperm(len(windows)).split(batch)[:-1]:
            chunk = windows[rows].long()
            yield chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


@torch.no_grad()
def evaluate(model: nn.Module, ids: list[Tensor], length: int = 1024) -> float:
    """Mean loss in nats per token, each held-out file in windows of its own."""
    total, count = 0.0, 0
    for document in ids:
        for window in document.split(length):
            if len(window) > 1:
                window = window.long()[None]
                n = window.shape[1] - 1
                total += model(window[:, :-1], window[:, 1:]).item() * n
                count += n
    return total / count


def save(
    out: Path, model: Llama, config: dict, tokenizer: Tokenizer, card: str
) -> None:
    """Write the folder's files to a temporary folder, then rename them."""
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "model." + k: v.detach().to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
    }
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(part / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **special,
        },
    }
    for name, content in files.items():
        (part / name).write_text(json.dumps(content, indent=2) + "\n")
    (part / "README.md").write_text(card)
    for path in part.iterdir():
        path.chmod(0o644)  # safetensors leaves its files to the owner alone
        os.replace(path, out / path.name)
    part.rmdir()


CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [code, python, demo]
---

# Demo model: small Python-code Llama

Purpose: text to decode speculatively in this project's demo and benchmarks, small
enough to live in the repository and to run on two CPU cores.  Made by
`demo/train_model.py`.  Not meant for any other use.

- Architecture: `LlamaForCausalLM`, {params:,} parameters; hidden {hidden_size},
  {num_hidden_layers} layers, {num_attention_heads} heads ({num_key_value_heads} KV)
  of {head_dim}, MLP {intermediate_size}, tied embeddings, bf16 weights.
- Tokenizer: byte-level BPE, {vocab_size} tokens, exact round trip; `<s>` is 0, `</s>`
  (end of file) is 1.  No BOS is added, in training or by the tokenizer.
- Training: {seen:,} tokens ({steps:,} steps of {batch:,}) in {minutes:.0f} minutes
  on {threads} CPU threads ({machine}; PyTorch {torch}, float32).  Windows of 512,
  then 1024, then 2048 tokens of whole files, `</s>` between files.  Muon for the
  layers' matrices and AdamW for the rest; linear decay of the rate to 0.
- Held-out loss: {loss:.3f} nats per token, {bits:.3f} bits per byte, on
  {held_files} files ({held_bytes:,} bytes) of the standard library that training
  did not see; files that repeat over a fifth of their lines were dropped too.

## Corpus

Python {python}'s standard library and installed packages ({corpus_bytes:,} bytes,
{corpus_tokens:,} tokens in all).  Generated tables, vendored copies and most of
`transformers/models` are left out, as is every file that names HumanEval, GSM8K or
MBPP.  A pass visits a file as often as its weight says; a weight below 1 is the
share of the files used ({test_weight} for the standard library's tests).

| Source | Licence | Files | Bytes | Weight |
|---|---|---:|---:|---:|
{table}

## Limits

It writes text that looks like Python, not programs that work.  Greedy decoding of
such a small model soon repeats itself; sampling at temperature 0.8 does so less.
It knows no natural language beyond comments and docstrings, follows no
instructions, and may recite passages of the sources above, under their licences.
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4096, help="tokens in a step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW: a fifth")
    parser.add_argument("--save-every", type=float, default=6.0, help="minutes")
    parser.add_argument("--resume", action="store_true", help="start from --out")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    documents = gather()
    print(corpus_table(documents), flush=True)
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(documents, args.vocab)
    encoded = tokenizer.encode_batch_fast([d.text for d in documents])
    tokens = [torch.tensor([*e.ids, EOS], dtype=torch.int16) for e in encoded]
    del encoded
    pairs = list(zip(documents, tokens, strict=True))
    assert all(tokenizer.decode(t[:-1].tolist()) == d.text for d, t in pairs[:50])
    train = [t for d, t in pairs if not d.held_out]
    weights = [d.weight for d in documents if not d.held_out]
    held = [t for d, t in pairs if d.held_out]
    held_bytes = sum(len(d.text.encode()) for d in documents if d.held_out)
    held_tokens = sum(map(len, held))
    sizes = [len(t) * w for t, w in zip(train, weights, strict=True)]
    print(f"tokens {sum(map(len, train)):,}, pass {sum(sizes):,.0f}", flush=True)
    print(f"held out {held_tokens:,} tokens, {held_bytes:,} bytes", flush=True)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64,
        "num_key_value_heads": args.hidden // 128,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }
    model = Llama(config)
    if args.resume:
        state = load_file(args.out / "model.safetensors")
        model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step_model = model if args.no_compile else torch.compile(model, dynamic=False)
    lengths = ((0.0, 512), (0.65, 1024), (0.92, 2048))
    start, seen, steps, length = time.monotonic(), 0, 0, 0
    saved = marked = start
    mean, marked_seen = None, 0

    def checkpoint(elapsed: float) -> None:
        loss = evaluate(model, held)
        bits = loss * held_tokens / held_bytes / math.log(2)
        print(f"held-out {loss:.4f} nats/token, {bits:.4f} bits/byte", flush=True)
        card = CARD.format(
            **config,
            params=sum(p.numel() for p in model.parameters()),
            seen=seen,
            steps=steps,
            batch=args.batch,
            minutes=elapsed / 60,
            threads=args.threads,
            machine=platform.machine(),
            torch=torch.__version__,
            python=platform.python_version(),
            loss=loss,
            bits=bits,
            held_files=len(held),
            held_bytes=held_bytes,
            corpus_bytes=sum(len(d.text.encode()) for d in documents),
            corpus_tokens=sum(map(len, tokens)),
            test_weight=TEST_WEIGHT,
            table=corpus_table(documents),
        )
        save(args.out, model, config, tokenizer, card)

    while (done := (time.monotonic() - start) / (args.minutes * 60)) < 1:
        wanted = [n for since, n in lengths if since <= done][-1]
        if wanted != length:
            length = wanted
            rows = max(1, args.batch // length)
            stream = batches(train, weights, length, rows, args.seed + length)
        rate = args.lr * min(1.0, (steps + 1) / 100, 1.02 - done)
        ids, targets = next(stream)
        loss = step_model(ids, targets)
        loss.backward()
        muon.step(rate, decay=0.1)
        for group in adam.param_groups:
            group["lr"] = rate / 5
        adam.step()
        model.zero_grad()
        steps, seen = steps + 1, seen + ids.numel()
        value = loss.item()
        mean = value if mean is None else 0.98 * mean + 0.02 * value
        now = time.monotonic()
        if steps % 20 == 0:
            speed = (seen - marked_seen) / (now - marked)
            marked, marked_seen = now, seen
            print(
                f"{(now - start) / 60:6.2f} min  step {steps}  length {length}  "
                f"tokens {seen:,}  loss {mean:.4f}  {speed:,.0f} tokens/s",
                flush=True,
            )
        if steps == 50 or now - saved > args.save_every * 60:
            checkpoint(now - start)
            saved = now
    checkpoint(time.monotonic() - start)


if __name__ == "__main__":
    main()
