# SPDX-License-Identifier: Apache-2.0
"""The core driven by a transformers model, without an engine."""

from collections.abc import Sequence

import torch
from tree_model import Draft, TreeModel  # type: ignore[import-not-found]

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.best_first import Hints, Rejected
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS, model_bigrams
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.params import LookaheadParams

# Chance from which a node is drafted: as many as there is room for, nearly.
LEAST = 0.005


@torch.inference_mode()
def ask(model: TreeModel, prefix: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bigrams and their logits, as an engine asks for them when it starts."""

    def likeliest(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.tensor(prefix, dtype=torch.int64).expand(len(tokens), -1)
        ids = torch.cat([before, tokens[:, None]], 1)
        return model.model(ids).logits[:, -1].topk(NUM_SUCCESSORS)

    vocab_size = model.model.config.vocab_size
    return model_bigrams(likeliest, vocab_size, vocab_size, chunk=256)


class OurLookahead:
    """One request on pages of its own. K/V is the model's, so nothing is compacted.

    Attributes:
        batch, hints, tree: of the last draft; None before the first one.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: LookaheadParams,
        model: TreeModel,
        bigrams: tuple[torch.Tensor, torch.Tensor],
        block_size: int,
        max_tokens: int,
        temperature: float = 0.0,
        seeds: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            model: what answers the drafts.
            bigrams: as `ask` gives them.
            block_size: tokens of a block of pages.
            temperature: 0 for greedy decoding.
            seeds: [max_tokens + N] int64 of the noise of each token, if there is any.
        """
        self.ops, self.params, self.prompt = NumbaOps(), params, list(prompt)
        self.model, self.bigrams = model, bigrams
        room = len(prompt) + max_tokens + params.max_tree_size
        num_blocks = -(-room // block_size)
        self.pages = BlockPages.allocate(num_blocks, block_size, params)
        self.table = torch.arange(num_blocks, dtype=torch.int32)[None]
        self.position, self.root = len(prompt) - 1, prompt[-1]
        self.temperature = torch.tensor([temperature], dtype=torch.float32)
        no_seeds = torch.zeros(max_tokens + params.ngram_size, dtype=torch.int64)
        self.seeds = no_seeds if seeds is None else seeds
        self.num_emitted = 0
        self.rejected = Rejected.none(1)
        self.batch: RequestBatch | None = None
        self.hints: Hints | None = None
        self.tree: DraftTree | None = None

    def _write(self, start: int, tokens: list[int]) -> None:
        slots = torch.arange(start, start + len(tokens))
        self.ops.write_tokens(self.pages, slots, torch.tensor(tokens))

    def propose(self) -> Draft:
        if self.prompt:  # the prefill
            return Draft.from_parents([self.root], [-1])
        self._write(self.position, [self.root])

        def one(value: int) -> torch.Tensor:
            return torch.tensor([value], dtype=torch.int32)

        self.batch = RequestBatch(
            block_table=self.table,
            position=one(self.position),
            root=one(self.root),
            window_size=one(self.params.window_size),
            ngram_size=one(self.params.ngram_size),
            verification_set_size=one(self.params.verification_set_size),
            max_nodes=one(self.params.max_tree_size),
        )
        ahead = torch.arange(self.params.ngram_size - 1) + self.num_emitted
        self.hints = Hints(
            *self.bigrams, self.temperature, self.seeds[ahead][None], self.rejected
        )
        self.tree, _ = self.ops.grow(self.pages, self.batch, self.hints, LEAST)
        size = int(self.tree.num_nodes)
        return Draft(
            self.tree.tokens[0, :size].tolist(),
            self.tree.depths[0, :size].tolist(),
            ancestors(self.tree)[0, :size, :size],
        )

    def accept(self, sampled: list[int]) -> tuple[list[int], list[int]]:
        if self.prompt:
            self._write(0, self.prompt)
            self.prompt = []
            emitted, path = sampled, [0]
        else:
            assert self.batch is not None and self.tree is not None
            answers = torch.full_like(self.tree.tokens, -1)
            answers[0, : len(sampled)] = torch.tensor(sampled)
            verdict = self.ops.verify(self.tree, answers, self.params.ngram_size)
            self.ops.update(self.pages, self.batch, self.tree, answers, verdict)
            count = int(verdict.num_emitted)
            emitted = verdict.tokens[0, :count].tolist()
            path = verdict.path[0, :count].tolist()
            node = torch.arange(self.tree.tokens.shape[1])[None]
            self.rejected = Rejected.of(
                self.tree, verdict.num_emitted, node, self.model.logits
            )
        self.position += len(emitted)
        self.num_emitted += len(emitted)
        self.root = emitted[-1]
        return emitted, path
