# SPDX-License-Identifier: Apache-2.0
"""What plain decoding says, recorded once, and the model's answers beside that path.

A node of a draft tree that lies on plain's text is answered from the recording. Any
other one is answered by a real forward over the recorded K/V, once per request: its
answer is kept by the path that leads to it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.simulate.protocol import Answers, Tree
from vllm_lookahead.core.draft.noise import cpu_noise

# Likeliest tokens kept of each distribution. Those below count as the last one.
KEPT = 256
# Tokens recorded beyond those asked for, so that the last drafts are answered too.
BEYOND = 16


@dataclass
class Record:
    """One request as plain decoding serves it.

    Attributes:
        prompt: its tokens.
        output: tokens, the first one from the prefill.
        temperature: 0 for greedy.
        seeds: [len(output) + BEYOND] int64, what each token's noise is keyed by.
        ids, logprobs: [len(prompt) + len(output) - 1, KEPT] after each position.
    """

    prompt: list[int]
    output: list[int]
    temperature: float
    seeds: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


def top(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the likeliest tokens of each row."""
    kept = min(KEPT, logits.shape[-1])
    values, ids = logits.log_softmax(-1).topk(kept)
    return ids.int().numpy(), values.numpy()


@dataclass
class Noise:
    """Of one request's sampler, known before the forward pass."""

    seeds: np.ndarray
    vocab_size: int
    known: dict[int, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, number: int) -> np.ndarray:
        """[V] of the output's token of this number."""
        if number not in self.known:
            seed = int(self.seeds[min(number, len(self.seeds) - 1)])
            tokens = np.arange(self.vocab_size)
            self.known[number] = cpu_noise(seed, number, tokens)
        return self.known[number]


class Model:
    """A transformers model, fp32, that answers trees over a fixed text's K/V."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size
        ids = model.generation_config.eos_token_id
        self.eos_ids = set(ids) if isinstance(ids, list) else {ids} - {None}

    @classmethod
    def load(cls, path: str) -> "Model":
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    def sample(
        self, logits: torch.Tensor, temperature: float, noise: np.ndarray | None
    ) -> int:
        """The sampler: argmax, or of the logits with noise (as vLLM's on a CPU)."""
        if temperature == 0:
            return int(logits.argmax())
        assert noise is not None
        return int((logits.double() / temperature + torch.from_numpy(noise)).argmax())

    @torch.inference_mode()
    def record(
        self, prompt: list[int], max_tokens: int, temperature: float, seed: int
    ) -> Record:
        """Decode plainly until an EOS id or `max_tokens`, and some tokens beyond."""
        from transformers import DynamicCache

        length = max_tokens + BEYOND
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**31, (length + BEYOND,), generator=generator).numpy()
        noise, cache = Noise(seeds, self.vocab_size), DynamicCache()
        output: list[int] = []
        ids: list[np.ndarray] = []
        logprobs: list[np.ndarray] = []
        fed = prompt
        while len(output) < length:
            logits = self.model(torch.tensor([fed]), past_key_values=cache).logits[0]
            for kept, part in zip((ids, logprobs), top(logits), strict=True):
                kept.append(part)
            key = noise[len(output)] if temperature > 0 else None
            output.append(self.sample(logits[-1], temperature, key))
            fed = output[-1:]
            if fed[0] in self.eos_ids:
                break
        return Record(
            prompt,
            output,
            temperature,
            seeds,
            np.concatenate(ids),
            np.concatenate(logprobs),
        )


class Oracle:
    """Answers the trees of one request."""

    def __init__(self, model: Model, record: Record) -> None:
        self.model, self.record = model, record
        self.text = record.prompt + record.output
        self.noise = Noise(record.seeds, model.vocab_size)
        self.known: dict[tuple[int, tuple[int, ...]], tuple] = {}
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_forwards = 0

    def _place(self, position: int, path: list[int]) -> tuple[int, tuple[int, ...]]:
        """Position of the last token that is plain's, and the tokens after it."""
        agreed = 0
        while (
            agreed < len(path)
            and position + 1 + agreed < len(self.text) - 1
            and path[agreed] == self.text[position + 1 + agreed]
        ):
            agreed += 1
        return position + agreed, tuple(path[agreed:])

    def answer(self, position: int, tree: Tree, all_nodes: bool) -> Answers:
        """What the model says after the nodes.

        Args:
            position: of the root in the text.
            tree: T nodes.
            all_nodes: whether nodes that plain's text does not reach are answered.

        Returns:
            Answers, with -1 sampled where there is none.
        """
        paths = tree.paths()
        places = [self._place(position, path) for path in paths]
        if all_nodes:
            self._ask(dict.fromkeys(p for p in places if p[1] and p not in self.known))
        sampled, ids, logprobs = [], [], []
        record = self.record
        nothing = np.full(record.ids.shape[1], -1, np.int32)
        for at, rest in places:
            if not rest:
                sampled.append(self.text[at + 1])
                ids.append(record.ids[at])
                logprobs.append(record.logprobs[at])
            elif all_nodes:
                for kept, part in zip(
                    (sampled, ids, logprobs), self.known[at, rest], strict=True
                ):
                    kept.append(part)
            else:
                sampled.append(-1)
                ids.append(nothing)
                logprobs.append(record.logprobs[0])
        return Answers(sampled, np.stack(ids), np.stack(logprobs))

    @torch.inference_mode()
    def _ask(self, places: dict[tuple[int, tuple[int, ...]], None]) -> None:
        """One forward over nodes that are not plain's, and those on the way to them."""
        from transformers import DynamicCache

        if not places:
            return
        nodes = sorted(
            {(at, rest[: i + 1]) for at, rest in places for i in range(len(rest))},
            key=lambda node: len(node[1]),
        )
        if not self.layers:
            cache: Any = DynamicCache()
            text = torch.tensor([self.text[:-1]])
            self.model.model(text, past_key_values=cache, logits_to_keep=1)
            self.layers = [(layer.keys, layer.values) for layer in cache.layers]
        length = max(at for at, _ in nodes) + 1
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys[:, :, :length], values[:, :, :length], i)
        index = {node: i for i, node in enumerate(nodes)}
        mask = torch.full((len(nodes), length + len(nodes)), torch.finfo().min)
        for i, (at, rest) in enumerate(nodes):
            mask[i, : at + 1] = 0
            for size in range(1, len(rest) + 1):
                mask[i, length + index[at, rest[:size]]] = 0
        logits = self.model.model(
            torch.tensor([[rest[-1] for _, rest in nodes]]),
            position_ids=torch.tensor([[at + len(rest) for at, rest in nodes]]),
            attention_mask=mask[None, None],
            past_key_values=cache,
        ).logits[0]
        self.num_forwards += 1
        ids, logprobs = top(logits)
        temperature = self.record.temperature
        for i, (at, rest) in enumerate(nodes):
            number = at + 1 + len(rest) - len(self.record.prompt)
            noise = self.noise[number] if temperature > 0 else None
            token = self.model.sample(logits[i], temperature, noise)
            self.known[at, rest] = token, ids[i], logprobs[i]


def load_records(
    model: Model,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
    file: Path,
) -> list[Record]:
    """Plain's runs over the prompts, from the file if they are there."""
    records: list[Record] = []
    if file.exists():
        records = torch.load(file, weights_only=False)
    known = [r.prompt for r in records]
    if known[: len(prompts)] != prompts:
        done = 0
        while done < min(len(known), len(prompts)) and known[done] == prompts[done]:
            done += 1
        records = records[:done] + [
            model.record(prompt, max_tokens, temperature, done + i)
            for i, prompt in enumerate(prompts[done:])
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(records, file)
    return records[: len(prompts)]
