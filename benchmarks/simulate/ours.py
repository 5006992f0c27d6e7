# SPDX-License-Identifier: Apache-2.0
"""What the package drafts: `draft`, on pages of its own."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from benchmarks.simulate.one_request import OneRequest
from benchmarks.simulate.protocol import Answers, Request, Tree
from vllm_lookahead.core.answers import Answers as TopTokens
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.corpus import NO_SALT, Owners, behind
from vllm_lookahead.core.draft.estimate import WEIGHTS, Hints
from vllm_lookahead.core.draft.grow import estimator_of
from vllm_lookahead.core.draft.noise import cpu_noise
from vllm_lookahead.core.pages import NUM_ANSWERS, BlockPages
from vllm_lookahead.core.tree import WINDOW
from vllm_lookahead.numba_kernels.ops import NumbaOps
from vllm_lookahead.numba_kernels.tables import Tables
from vllm_lookahead.params import MAX_TREE_NODES, LookaheadParams

BLOCK_SIZE = 16


class Tenant:
    """Requests under one salt, served one after the other from the same pages."""

    MOST_BLOCKS = 2048

    def __init__(self, sizes: tuple[int, int, int]) -> None:
        params = LookaheadParams(*sizes)
        self.pages = BlockPages.allocate(self.MOST_BLOCKS, BLOCK_SIZE, params)
        self.owners = Owners.allocate(self.MOST_BLOCKS)

    def give_out(self, num_blocks: int) -> int:
        """The first of so many blocks in a row."""
        first = self.owners.count
        blocks = torch.arange(first, first + num_blocks)
        self.owners.give_out(self.pages, blocks, torch.zeros_like(blocks) + NO_SALT)
        return first

    def behind_others(self, batch: RequestBatch) -> RequestBatch:
        salts = torch.full((1,), NO_SALT)
        others = self.owners.others(batch, salts, BLOCK_SIZE)
        return behind(batch, *others, BLOCK_SIZE)


class Ours:
    """One request on pages of its own.

    Attributes:
        chances: log-chance of each node of the last tree.
    """

    reads_all_nodes = reads_noise = True

    def __init__(
        self,
        request: Request,
        sizes: tuple[int, int, int],
        weights: Mapping[str, float] = WEIGHTS,
        alone: bool = False,
        tenant: Tenant | None = None,
    ) -> None:
        """
        Args:
            sizes: W, N and G.
            weights: of the sources.
            alone: whether bigrams are those of tokens that nothing precedes.
            tenant: whose earlier requests are read as well.
        """
        self.request, self.weights = request, weights
        self.tenant = tenant
        room = len(request.prompt) + request.max_tokens + sizes[1]
        if not tenant:
            room += MAX_TREE_NODES
        self.one = OneRequest(
            NumbaOps(),
            LookaheadParams(*sizes),
            len(request.prompt),
            request.first,
            1,
            room,
            BLOCK_SIZE,
            tenant.pages if tenant else None,
            tenant.give_out(-(-room // BLOCK_SIZE)) if tenant else 0,
        )
        self.tables = Tables()
        table = request.alone if alone else request.after
        self.bigrams = torch.from_numpy(table.ids), torch.from_numpy(table.logprobs)
        self.one.write(0, request.prompt)

    @property
    def number(self) -> int:
        """Of the output's token that follows the root."""
        return self.one.num_emitted

    def evidence(self, path: list[int]) -> Iterable[tuple[str, dict[int, float]]]:
        """Of the step whose tree was drafted last."""
        (request,) = self.batch.requests()
        known = self.one.pages, request, self.hints, 0, self.weights
        return estimator_of(*known).evidence(path)

    @property
    def hints(self) -> Hints:
        """Of the step to come."""
        ahead = np.arange(self.one.params.ngram_size - 1) + self.one.num_emitted
        seeds = self.request.seeds[ahead.clip(max=len(self.request.seeds) - 1)]
        return Hints(
            *self.bigrams,
            torch.tensor([self.request.temperature]),
            torch.from_numpy(seeds)[None],
            cpu_noise,
        )

    def draft(self, budget: int) -> Tree:
        one = self.one
        self.batch = one.batch(budget)
        num_blocks = self.batch.block_table.shape[1]
        self.tables.choose([self], one.pages, num_blocks)
        self.tree, chances = one.ops.draft(
            one.pages,
            self.tenant.behind_others(self.batch) if self.tenant else self.batch,
            self.hints,
            one.params.verification_set_size,
            self.weights,
            self.tables,
        )
        size = int(self.tree.num_nodes)
        self.chances = [0.0, *chances[0, 1:size].double().log().tolist()]
        return Tree(
            self.tree.tokens[0, :size].tolist(),
            self.tree.parents[0, :size].tolist(),
            int((self.tree.kinds[0, :size] != WINDOW).sum()),
        )

    def accept(self, answers: Answers, path: Sequence[int]) -> None:
        said = TopTokens(
            torch.from_numpy(answers.ids[:, :NUM_ANSWERS].astype(np.int32)),
            torch.from_numpy(answers.logprobs[:, :NUM_ANSWERS].astype(np.float32)),
            torch.zeros(1, dtype=torch.int32),
        )
        verdict = self.one.accept(self.batch, self.tree, answers.sampled, said)
        count = int(verdict.num_emitted)
        assert verdict.path[0, :count].tolist() == list(path)
