# SPDX-License-Identifier: Apache-2.0
"""Block-resident state: one page per physical KV block.

A page holds what lookahead knows *at* that block: the tokens whose K/V lies in
its slots; the n-grams that the window found, and the answers that the model gave, while
the request's tail was in it; and the Jacobi window. Requests own no state. They find
pages through their own block table, so sharing, eviction, preemption and isolation are
those of the KV cache.

The tail block of a request at root position p is the block of position p-1, the
last token whose K/V is final. A page that is stale costs speed, never a
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_lookahead.core.batch import Request
from vllm_lookahead.params import SALT, LookaheadParams

EMPTY = -1
# Jacobi n-grams that a block keeps per slot. A step harvests W of them for the S
# tokens it emits. W=15, N=5, G=15, blocks of 16, a 5M model, S on HumanEval, GSM8K
# and MT-Bench: 1 per slot 3.00, 3.00, 3.14; 2: 3.05, 3.07, 3.16; 3: 3.07, 3.09, 3.22;
# 4: 3.10, 3.11, 3.25; 16: 3.12, 3.11, 3.24.
NGRAMS_PER_SLOT = 4
# A block keeps at most 8 answers per slot, each the 4 likeliest tokens after 3 others.
ANSWERS_PER_SLOT, NUM_ANSWERS, CONTEXT = 8, 4, 3
# Rings of n-grams and of answers are searched in the blocks of so many tokens before
# the root; the history is searched whole.
REACH = 1024


@dataclass(eq=False)
class BlockPages:
    """The pages of all `num_blocks` physical blocks. EMPTY marks an unused cell.

    Attributes:
        tokens: [num_blocks, block_size] int32, token whose K/V is in the slot.
            Read as one sequence through a block table, it is the request's
            history: every n-gram of prompt and output, of any length.
        ring: [num_blocks, ring_size, N+1] int32, Jacobi n-grams as
            (token before the key, key, N-1 values), the oldest overwritten.
        ring_count: [num_blocks] int32, n-grams ever put into the block's ring.
        window: [num_blocks, N-1, W] int32, the Jacobi window; (0, 0) is unused,
            its place is the root's.
        answers: [num_blocks, A, CONTEXT + R] int32, a ring of answers as (context, the
            nearest token first; likeliest tokens), R = NUM_ANSWERS.
        answer_logprobs: [num_blocks, A, R] float32, of these tokens.
        answer_count: [num_blocks] int32, answers ever put into the block's ring.
    """

    tokens: torch.Tensor
    ring: torch.Tensor
    ring_count: torch.Tensor
    window: torch.Tensor
    answers: torch.Tensor
    answer_logprobs: torch.Tensor
    answer_count: torch.Tensor

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        params: LookaheadParams,
        device: torch.device | str = "cpu",
    ) -> "BlockPages":
        def empty(*shape: int) -> torch.Tensor:
            return torch.full(shape, EMPTY, dtype=torch.int32, device=device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        n, w, r = params.ngram_size, params.window_size, NUM_ANSWERS
        kept = num_answers(block_size, params)
        return cls(
            tokens=empty(num_blocks, block_size),
            ring=empty(num_blocks, ring_size(block_size, params), n + 1),
            ring_count=zeros(num_blocks),
            window=empty(num_blocks, n - 1, w),
            answers=empty(num_blocks, kept, CONTEXT + r),
            answer_logprobs=zeros(num_blocks, kept, r, dtype=torch.float32),
            answer_count=zeros(num_blocks),
        )

    @property
    def block_size(self) -> int:
        return self.tokens.shape[1]

    @property
    def ngram_size(self) -> int:
        """N of the server."""
        return self.window.shape[1] + 1

    def history(self, request: Request) -> list[int]:
        """A request's tokens at positions 0..p-1, EMPTY where unknown."""
        num_blocks = -(-request.position // self.block_size)
        tokens = self.tokens[request.blocks[:num_blocks]].flatten()
        return tokens[: request.position].tolist()

    def recent_blocks(self, request: Request) -> list[int]:
        """Those whose n-grams and answers are read, the oldest first."""
        end = -(-request.position // self.block_size)
        return request.blocks[max(0, end - num_recent_blocks(self.block_size)) : end]

    def ngrams(self, block: int) -> list[list[int]]:
        """A block's ring, oldest first: (token before the key, key, values) each."""
        ring = self.ring[block].tolist()
        return [ring[cell] for cell in oldest_first(self.ring_count[block], len(ring))]

    def copy_blocks(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Pages follow their blocks when vLLM copies K/V. src, dst: [n] int64."""
        for page in vars(self).values():
            page[dst] = page[src]


def oldest_first(count: int | torch.Tensor, size: int) -> list[int]:
    """Cells of a ring of so many, into which `count` entries were ever put."""
    return [at % size for at in range(max(0, int(count) - size), int(count))]


def until_empty(tokens: Sequence[int]) -> list[int]:
    """The first tokens, as far as they are known."""
    return list(tokens[: [*tokens, EMPTY].index(EMPTY)])


def num_recent_blocks(block_size: int) -> int:
    """How many blocks before the root are read for n-grams and answers."""
    return max(1, REACH // block_size)


def ring_size(block_size: int, params: LookaheadParams) -> int:
    """Entries of a block's ring: what its slots may yield, and at least one harvest."""
    w = params.window_size
    return max(w, block_size * min(w, NGRAMS_PER_SLOT))


def num_answers(block_size: int, params: LookaheadParams) -> int:
    """A, entries of a block's ring of answers: none where no candidate is drafted.

    Small trees leave fewer for each token that comes of them.
    """
    nodes = params.max_candidate_nodes
    return block_size * min(ANSWERS_PER_SLOT, -(-(1 + nodes) // 2)) if nodes else 0


def page_bytes(block_size: int, params: LookaheadParams) -> int:
    """Bytes that one block's page takes; the KV budget gives them up."""
    n, w = params.ngram_size, params.window_size
    cells = block_size + ring_size(block_size, params) * (n + 1) + 1 + (n - 1) * w
    cells += num_answers(block_size, params) * (CONTEXT + 2 * NUM_ANSWERS) + 1
    owner = 16 if params.pool_scope == SALT else 0  # `core.corpus.Owners`
    return 4 * cells + owner
