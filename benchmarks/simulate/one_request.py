# SPDX-License-Identifier: Apache-2.0
"""The core's operations on one request, without an engine."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_lookahead.core.answers import Answers
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams


class OneRequest:
    """Pages of its own, and where it stands.

    Attributes:
        position, root: of the last token, which the next step feeds.
        num_emitted: tokens said so far, the root among them.
    """

    def __init__(
        self,
        ops: Any,
        params: LookaheadParams,
        position: int,
        root: int,
        num_emitted: int,
        max_tokens: int,
        block_size: int,
        pages: BlockPages | None = None,
        first_block: int = 0,
    ) -> None:
        """
        Args:
            ops: `NumbaOps` or `ReferenceOps`.
            max_tokens: the pages have room for, prompt and trees among them.
            block_size: tokens of a block of pages.
            pages: that it shares; by default its own.
            first_block: of them that is its own, as are those behind.
        """
        self.ops, self.params = ops, params
        self.position, self.root, self.num_emitted = position, root, num_emitted
        num_blocks = -(-max_tokens // block_size)
        self.pages = pages or BlockPages.allocate(num_blocks, block_size, params)
        self.table = torch.arange(num_blocks, dtype=torch.int32)[None] + first_block

    def write(self, start: int, tokens: Sequence[int]) -> None:
        start += int(self.table[0, 0]) * self.pages.block_size
        slots = torch.arange(start, start + len(tokens))
        self.ops.write_tokens(self.pages, slots, torch.tensor(tokens))

    def batch(self, max_nodes: int) -> RequestBatch:
        """Of this request alone, its root written."""
        self.write(self.position, [self.root])

        def one(value: int) -> torch.Tensor:
            return torch.tensor([value], dtype=torch.int32)

        return RequestBatch(
            block_table=self.table,
            position=one(self.position),
            root=one(self.root),
            window_size=one(self.params.window_size),
            ngram_size=one(self.params.ngram_size),
            verification_set_size=one(self.params.verification_set_size),
            max_nodes=one(max_nodes),
        )

    def accept(
        self,
        batch: RequestBatch,
        tree: DraftTree,
        sampled: Sequence[int],
        answers: Answers,
    ) -> Verdict:
        """Verify, update, and stand behind what was emitted.

        Args:
            sampled: the token after each node, of the first nodes at least.
            answers: the likeliest ones.
        """
        by_node = torch.full_like(tree.tokens, -1)
        by_node[0, : len(sampled)] = torch.tensor(sampled)
        verdict: Verdict = self.ops.verify(tree, by_node, self.params.ngram_size)
        self.ops.update(self.pages, batch, tree, by_node, verdict)
        self.ops.keep_answers(self.pages, batch, tree, verdict, answers)
        self.advance(verdict.tokens[0, : int(verdict.num_emitted)].tolist())
        return verdict

    def advance(self, emitted: Sequence[int]) -> None:
        self.position += len(emitted)
        self.num_emitted += len(emitted)
        self.root = emitted[-1]
