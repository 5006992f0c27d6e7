# SPDX-License-Identifier: Apache-2.0
"""A transformers model that answers every node of a draft tree in one forward."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Draft:
    """A tree of T nodes, the root first.

    Attributes:
        tokens: [T].
        depths: [T], distance from the root.
        sees: [T, T] bool, node i sees node j of the tree: ancestors and itself.
    """

    tokens: list[int]
    depths: list[int]
    sees: torch.Tensor

    @classmethod
    def from_parents(cls, tokens: list[int], parents: list[int]) -> "Draft":
        """`parents[i] < i`; the root's is not read."""
        size = len(tokens)
        depths, sees = [0] * size, torch.eye(size, dtype=torch.bool)
        for node in range(1, size):
            depths[node] = depths[parents[node]] + 1
            sees[node] |= sees[parents[node]]
        return cls(tokens, depths, sees)


class TreeModel:
    """One sequence: the K/V of its tokens up to the root, and a forward over trees.

    Attributes:
        length: tokens whose K/V is kept.
        logits: [T, V] of the last forward.
    """

    def __init__(self, path: str, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self.dtype = dtype
        self.reset()

    @property
    def eos_ids(self) -> set[int]:
        """All of them, as generation_config.json has it."""
        ids = self.model.generation_config.eos_token_id
        return set(ids) if isinstance(ids, list) else {ids} - {None}

    def reset(self) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache()
        self.length = 0

    @torch.inference_mode()
    def forward(self, draft: Draft) -> list[int]:
        """The likeliest token after each node; the nodes' K/V waits for `keep`."""
        size, context = len(draft.tokens), self.length
        mask = torch.zeros(size, context + size, dtype=self.dtype)
        mask[:, context:].masked_fill_(~draft.sees, torch.finfo(self.dtype).min)
        logits = self.model(
            input_ids=torch.tensor([draft.tokens]),
            position_ids=torch.tensor([draft.depths]) + context,
            attention_mask=mask[None, None],
            past_key_values=self.cache,
        ).logits
        self.logits = logits[0]
        return self.logits.argmax(-1).tolist()

    @torch.inference_mode()
    def keep(self, path: list[int]) -> None:
        """Of the last tree keep these nodes' K/V, in that order."""
        at = torch.tensor([*range(self.length), *(self.length + i for i in path)])
        for layer in self.cache.layers:
            layer.keys = layer.keys.index_select(2, at)
            layer.values = layer.values.index_select(2, at)
        self.length = len(at)

    def prefill(self, tokens: list[int]) -> None:
        """The K/V of a text, from the first token on."""
        self.reset()
        if tokens:
            chain = list(range(len(tokens)))
            self.forward(Draft.from_parents(tokens, [i - 1 for i in chain]))
            self.keep(chain)
