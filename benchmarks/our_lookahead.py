# SPDX-License-Identifier: Apache-2.0
"""The core driven by a transformers model, without an engine."""

from collections.abc import Sequence

import torch
from one_request import OneRequest  # type: ignore[import-not-found]
from tree_model import Draft, TreeModel  # type: ignore[import-not-found]

from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.best_first import Hints, Rejected
from vllm_lookahead.core.draft.bigrams import NUM_SUCCESSORS, model_bigrams
from vllm_lookahead.core.mask import ancestors
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
        self.prompt, self.model, self.bigrams = list(prompt), model, bigrams
        room = len(prompt) + max_tokens + params.max_tree_size
        self.request = OneRequest(
            NumbaOps(), params, len(prompt) - 1, prompt[-1], 0, room, block_size
        )
        self.temperature = torch.tensor([temperature], dtype=torch.float32)
        no_seeds = torch.zeros(max_tokens + params.ngram_size, dtype=torch.int64)
        self.seeds = no_seeds if seeds is None else seeds
        self.rejected = Rejected.none(1)
        self.batch: RequestBatch | None = None
        self.hints: Hints | None = None
        self.tree: DraftTree | None = None

    def propose(self) -> Draft:
        request = self.request
        if self.prompt:  # the prefill
            return Draft.from_parents([request.root], [-1])
        self.batch = request.batch(request.params.max_tree_size)
        ahead = torch.arange(request.params.ngram_size - 1) + request.num_emitted
        self.hints = Hints(
            *self.bigrams, self.temperature, self.seeds[ahead][None], self.rejected
        )
        self.tree, _ = request.ops.grow(request.pages, self.batch, self.hints, LEAST)
        size = int(self.tree.num_nodes)
        return Draft(
            self.tree.tokens[0, :size].tolist(),
            self.tree.depths[0, :size].tolist(),
            ancestors(self.tree)[0, :size, :size],
        )

    def accept(self, sampled: list[int]) -> tuple[list[int], list[int]]:
        if self.prompt:
            self.request.write(0, self.prompt)
            self.prompt = []
            self.request.advance(sampled)
            return sampled, [0]
        assert self.batch is not None and self.tree is not None
        verdict = self.request.accept(self.batch, self.tree, sampled)
        node = torch.arange(self.tree.tokens.shape[1])[None]
        self.rejected = Rejected.of(
            self.tree, verdict.num_emitted, node, self.model.logits
        )
        count = int(verdict.num_emitted)
        return verdict.tokens[0, :count].tolist(), verdict.path[0, :count].tolist()
