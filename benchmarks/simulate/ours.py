# SPDX-License-Identifier: Apache-2.0
"""What the package drafts today: `propose` on a GPU, `grow` on a CPU."""

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.one_request import OneRequest
from benchmarks.simulate.protocol import Answers, Request, Tree
from vllm_lookahead.core.draft.best_first import Hints, Rejected
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import WINDOW
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.params import MAX_TREE_NODES, LookaheadParams

BLOCK_SIZE = 16
# Chance from which `grow` drafts: as many nodes as there is room for.
LEAST = 1e-9


class Ours:
    """One request on pages of its own.

    Args:
        sizes: W, N and G.
        grows: whether trees are grown best first.
        after: whether bigrams are those after punctuation, and not today's.
    """

    def __init__(
        self,
        request: Request,
        sizes: tuple[int, int, int],
        grows: bool,
        after: bool = False,
    ) -> None:
        ops = NumbaOps() if grows else ReferenceOps()
        self.reads_all_nodes = grows or sizes[0] > 0
        self.grows, self.request = grows, request
        room = len(request.prompt) + request.max_tokens + MAX_TREE_NODES
        self.one = OneRequest(
            ops,
            LookaheadParams(*sizes),
            len(request.prompt),
            request.first,
            1,
            room,
            BLOCK_SIZE,
        )
        table = request.after if after else request.alone
        self.bigrams = torch.from_numpy(table.ids)
        # Among each other, as `core.draft.bigrams.model_bigrams` has them.
        self.bigram_logits = torch.from_numpy(table.logprobs).log_softmax(-1)
        self.rejected = Rejected.none(1)
        self.one.write(0, request.prompt)

    def draft(self, budget: int) -> Tree:
        one = self.one
        self.batch = one.batch(budget)
        if self.grows:
            ahead = np.arange(one.params.ngram_size - 1) + one.num_emitted
            seeds = self.request.seeds[ahead.clip(max=len(self.request.seeds) - 1)]
            hints = Hints(
                self.bigrams,
                self.bigram_logits,
                torch.tensor([self.request.temperature]),
                torch.from_numpy(seeds)[None],
                self.rejected,
            )
            self.tree, _ = one.ops.grow(one.pages, self.batch, hints, LEAST)
        else:
            most = one.params.verification_set_size
            self.tree = one.ops.propose(one.pages, self.batch, most, self.bigrams)
        size = int(self.tree.num_nodes)
        return Tree(
            self.tree.tokens[0, :size].tolist(),
            self.tree.parents[0, :size].tolist(),
            int((self.tree.kinds[0, :size] != WINDOW).sum()),
        )

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        verdict = self.one.accept(self.batch, self.tree, answers.sampled)
        count = int(verdict.num_emitted)
        assert verdict.path[0, :count].tolist() == list(path)
        if self.grows:
            self.rejected = self._rejected(answers, verdict.num_emitted)

    def _rejected(self, answers: Answers, num_emitted: torch.Tensor) -> Rejected:
        """Logits that were not kept are as low as the least that was."""
        logits = torch.from_numpy(answers.logprobs[:, -1:]).repeat(
            1, self.bigrams.shape[0]
        )
        logits.scatter_(
            1,
            torch.from_numpy(answers.ids).long().clamp(min=0),
            torch.from_numpy(answers.logprobs),
        )
        node = torch.arange(self.tree.tokens.shape[1])[None]
        return Rejected.of(self.tree, num_emitted, node, logits)
