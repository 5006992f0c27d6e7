# SPDX-License-Identifier: Apache-2.0
"""A fake language model over a fake paged KV cache, and a driver for whole runs.

The model is right about the next token only where everything that the mask lets
a node see is the right token at the right position. One wrong mask bit, position,
slot or K/V move, and it answers WRONG or takes another turn of its hash.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.core.build import Row, ints, make_batch, make_hints, make_pages, write
from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import EMPTY, NUM_ANSWERS
from vllm_lookahead.core.step import step
from vllm_lookahead.core.tree import WINDOW, DraftTree

POISON = -1_000_003
WRONG = 999_983


def _mix(h: int, value: int) -> int:
    return (h * 6_364_136_223_846_793_005 + value) & ((1 << 61) - 1)


@dataclass(frozen=True)
class FakeModel:
    """Next token = hash of the last `order` tokens, or of all of them.

    Attributes:
        vocab: how many tokens there are.
        order: how many tokens back the hash reaches; 0: to the first one.
    """

    vocab: int
    order: int

    def next_token(self, text: Sequence[int]) -> int:
        return self.after(self.read(text), [])

    def read(self, text: Sequence[int]) -> tuple[int, list[int]]:
        """What is to be known of a text: (hash of all of it, its last tokens)."""
        h = 1_000_003
        for token in text:
            h = _mix(h, token + 1)
        return h, list(text[-self.order :])

    def after(self, known: tuple[int, list[int]], branch: list[int]) -> int:
        """The token that follows a text and a branch."""
        h, last = known
        if self.order:
            h, branch = 0, [*last, *branch][-self.order :]
        for token in branch:
            h = _mix(h, token + 1)
        return (h >> 29) % self.vocab

    def likeliest(self, first: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens it says and some others, as `core.answers.Answers` has them."""
        others = torch.arange(min(self.vocab, NUM_ANSWERS), dtype=torch.int32)
        tokens = torch.full((len(first), NUM_ANSWERS), EMPTY, dtype=torch.int32)
        tokens[:, : len(others)] = (ints(first)[:, None] + others) % self.vocab
        falling = -0.2 - 1.5 * torch.arange(NUM_ANSWERS)
        return tokens, falling.repeat(len(first), 1)

    def bigrams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What it says after each token alone."""
        return self.likeliest([self.next_token([t]) for t in range(self.vocab)])

    def continue_text(self, prompt: Sequence[int], count: int) -> list[int]:
        """Sequential decoding: what lookahead must reproduce."""
        text = list(prompt)
        for _ in range(count):
            text.append(self.next_token(text))
        return text


@dataclass
class FakeRequest:
    """What an engine knows of a request. The last of `text` is the root."""

    prompt: list[int]
    w: int
    n: int
    g: int
    blocks: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)  # acceptance length per step

    def row(self, max_nodes: int) -> Row:
        p = len(self.text) - 1
        return Row(self.blocks, p, self.text[-1], self.w, self.n, self.g, max_nodes)


class FakeEngine:
    """Drives `LookaheadOps` as a vLLM runner does, over blocks handed out at random.

    The K/V of a slot is its (token, position); unused slots hold POISON. There are
    two caches of other strides, like K and V of a CPU cache.
    """

    def __init__(
        self,
        ops: Any,
        model: FakeModel,
        sizes: tuple[int, int, int],
        block_size: int,
        num_blocks: int,
        seed: int,
        with_bigrams: bool = False,
    ) -> None:
        """
        Args:
            with_bigrams: draft from those of the model.
        """
        w, self.n, self.g = sizes
        self.bigrams: dict[str, torch.Tensor] = {}
        if with_bigrams:
            names = "bigrams", "bigram_logprobs"
            self.bigrams = dict(zip(names, model.bigrams(), strict=True))
        self.ops, self.model, self.block_size = ops, model, block_size
        # What the engine's attention reads, where that is an op.
        self.ancestors = getattr(ops, "ancestors", ancestors)
        self.rng = random.Random(seed)
        self.pages = make_pages(num_blocks, block_size, w, self.n)
        shape = (num_blocks, 2, block_size), (2, num_blocks, block_size)
        k, v = (torch.full(s, POISON) for s in shape)
        self.caches = [k.permute(0, 2, 1), v.permute(1, 2, 0)]
        self.free = self.rng.sample(range(num_blocks), num_blocks)

    def start(
        self, request: FakeRequest, room: int, shared: Sequence[int] = ()
    ) -> None:
        """Prefill: give the request blocks and compute the K/V of all its tokens.

        Args:
            request: a new one, or one that was preempted.
            room: positions to make room for.
            shared: full blocks of the same tokens, found in the prefix cache.
        """
        wanted = -(-room // self.block_size) - len(shared)
        request.blocks = [*shared, *(self.free.pop() for _ in range(wanted))]
        first = not request.text
        final = request.prompt if first else request.text[:-1]
        start = len(shared) * self.block_size
        write(self.ops, self.pages, request.blocks, final[start:], start)
        self._put(request.blocks, start, final[start:], range(start, len(final)))
        if first:
            request.text = [*final, self.model.next_token(final)]

    def preempt(self, request: FakeRequest) -> None:
        self.free[:0] = request.blocks
        request.blocks = []

    def step(
        self, requests: Sequence[FakeRequest], max_nodes: Sequence[int] | None = None
    ) -> None:
        """One step of a batch: `core.step.step` itself."""
        limits = max_nodes or [10_000] * len(requests)
        rows = [r.row(limit) for r, limit in zip(requests, limits, strict=True)]
        batch = make_batch(rows, filler=self.rng.randrange(len(self.pages.window)))
        verdict = step(
            self.ops,
            lambda tree: self._forward(requests, tree),
            self.pages,
            self.caches,
            batch,
            make_hints(len(rows), self.n, **self.bigrams),
            self.g,
        )
        for b, request in enumerate(requests):
            count = int(verdict.num_emitted[b])
            request.text += verdict.tokens[b, :count].tolist()
            request.emitted.append(count)

    def _put(
        self,
        blocks: list[int],
        start: int,
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Write K/V to the slots from `start` on."""
        at = torch.arange(start, start + len(tokens))
        block, offset = (
            torch.tensor(blocks)[at // self.block_size],
            at % self.block_size,
        )
        for cache in self.caches:
            cache[block, offset] = torch.tensor([tokens, [*positions]]).T

    def _seen(self, blocks: list[int], count: int) -> list[tuple[int, int]]:
        """(token, position) of the first `count` slots, as all caches have it."""
        table = torch.tensor(blocks)
        k, v = (c[table].reshape(-1, 2)[:count].tolist() for c in self.caches)
        return [
            tuple(a) if a == b else (WRONG, WRONG) for a, b in zip(k, v, strict=True)
        ]

    def _forward(
        self, requests: Sequence[FakeRequest], tree: DraftTree
    ) -> tuple[torch.Tensor, Answers]:
        """The model's token after every node, and what else it thought of."""
        sampled = torch.full(tree.tokens.shape, WRONG, dtype=torch.int32)
        columns = tree.tokens, tree.depths, tree.kinds
        tokens, depths, kinds = (column.tolist() for column in columns)
        mask = self.ancestors(tree).tolist()
        said: list[int] = []
        first_row = []
        for b, request in enumerate(requests):
            p, size = len(request.text) - 1, int(tree.num_nodes[b])
            positions = [p + depth for depth in depths[b][:size]]
            self._put(request.blocks, p, tokens[b][:size], positions)
            cached = self._seen(request.blocks, p + size)
            context_is_right = cached[:p] == [
                (token, at) for at, token in enumerate(request.text[:p])
            ]
            known = self.model.read(request.text[:p])
            answers = []
            for i in range(size):
                seen = [cached[p + j] for j in range(size) if mask[b][i][j]]
                seen.sort(key=lambda kv: kv[1])
                run = list(range(p, p + depths[b][i] + 1))
                contiguous = [position for _, position in seen] == run
                if context_is_right and contiguous and seen[-1] == cached[p + i]:
                    branch = [token for token, _ in seen]
                    answers.append(self.model.after(known, branch))
                else:
                    answers.append(WRONG)
            sampled[b, :size] = ints(answers)
            first_row.append(len(said))
            said += [t for t, k in zip(answers, kinds[b], strict=False) if k != WINDOW]
        return sampled, Answers(*self.model.likeliest(said), ints(first_row))


def run_to_length(
    engine: FakeEngine,
    requests: Sequence[FakeRequest],
    length: int,
    max_tree: int | None = None,
) -> None:
    """Step until every request has `length` tokens.

    A step takes a random part of the requests in random order, as after aborts and
    arrivals: nothing may depend on a request's row. With `max_tree`, each tree is
    cut to a random size up to that.
    """
    rng = engine.rng
    while active := [r for r in requests if len(r.text) < length]:
        chosen = rng.sample(active, rng.randint(max(1, len(active) - 1), len(active)))
        limits = [rng.randint(1, max_tree) for _ in chosen] if max_tree else None
        engine.step(chosen, limits)
