# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests start from: random trees, poisoned memory."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from tests.core.build import ints, make_tree
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.draft.chains import merge
from vllm_lookahead.core.draft.pool import until_empty
from vllm_lookahead.core.draft.window import add_window
from vllm_lookahead.core.pages import BlockPages
from vllm_lookahead.core.reference import ReferenceOps
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, DraftTree, Node
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.params import LookaheadParams
from vllm_lookahead.triton_kernels.ops import TritonOps

# As an index, far outside of everything; as a token, nobody's.
POISON = 0x7F7F7F7F


def poisoned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.full(shape, POISON, dtype=dtype)


def poison_padding(tree: DraftTree) -> DraftTree:
    """A copy with garbage in the nodes beyond `num_nodes`."""
    size = tree.tokens.shape[1]
    dead = torch.arange(size) >= tree.num_nodes[:, None]
    names = ("tokens", "parents", "depths", "kinds")
    columns = {n: getattr(tree, n).masked_fill(dead, POISON) for n in names}
    return replace(tree, **columns)


def poison_table(batch: RequestBatch, block_size: int, ahead: int) -> RequestBatch:
    """A copy with garbage for blocks that nobody needs, `ahead` of the root."""
    columns = torch.arange(batch.block_table.shape[1])
    dead = columns * block_size > (batch.position + ahead)[:, None]
    return replace(batch, block_table=batch.block_table.masked_fill(dead, POISON))


def random_tree(rng: random.Random, size: int, max_depth: int) -> list[Node]:
    """A tree in which any node may be anyone's child, but for one's own."""
    nodes = [Node(rng.randrange(100), -1, 0, ROOT)]
    while len(nodes) < size:
        parent = rng.randrange(max(0, len(nodes) - 40), len(nodes))
        depth = nodes[parent].depth + 1
        if depth <= max_depth:
            kind = rng.choice([CANDIDATE, WINDOW])
            nodes.append(Node(rng.randrange(100), parent, depth, kind))
    return nodes


def random_trees(
    sizes: Sequence[int], columns: int, max_depth: int, seed: int
) -> DraftTree:
    """One tree of each size, poisoned up to `columns`; size 0 is padding."""
    rng = random.Random(seed)
    trees = [random_tree(rng, max(size, 1), max_depth) for size in sizes]
    trees.append([Node(0, -1, 0, ROOT)] * columns)
    tree = make_tree(trees)
    names = ("tokens", "parents", "depths", "kinds")
    kept = {name: getattr(tree, name)[:-1].contiguous() for name in names}
    return poison_padding(replace(tree, **kept, num_nodes=ints(list(sizes))))


def reference_trees(
    batch: RequestBatch, candidates: torch.Tensor, windows: torch.Tensor, size: int
) -> DraftTree:
    """Trees of given chains and windows.

    Args:
        batch: B requests.
        candidates: [B, G, N-1] int32, EMPTY beyond a chain's end.
        windows: [B, N-1, W] int32.
        size: T.
    """
    trees = []
    for request, chains, window in zip(
        batch.requests(), candidates.tolist(), windows.tolist(), strict=True
    ):
        nodes = merge([until_empty(chain) for chain in chains], request)
        rows = window[: request.ngram_size - 1]
        own = [row[: request.window_size] for row in rows]
        trees.append(add_window(nodes, own, request.max_nodes))
    return DraftTree.of(trees, size)


class AnySizeTritonOps(TritonOps):
    """`TritonOps` that takes its sizes from what each op is given."""

    def __init__(self) -> None:
        self._caches = []

    def _resize(self, pages: BlockPages, b: int, g: int) -> None:
        _, rows, columns = pages.window.shape
        super().__init__(LookaheadParams(columns, rows + 1, g), b, pages.window.device)
        for buffer in vars(self).values():
            for tensor in buffer if isinstance(buffer, list) else [buffer]:
                if isinstance(tensor, torch.Tensor):
                    tensor.fill_(POISON)
        self._scratch.found.fill_(POISON)
        self._scratch.count.fill_(POISON)

    def propose(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        max_candidates: int,
        *bigrams: torch.Tensor | None,
    ) -> DraftTree:
        self._resize(pages, len(batch.root), max_candidates)
        return super().propose(pages, batch, max_candidates, *bigrams)

    def verify(
        self, tree: DraftTree, sampled: torch.Tensor, max_emitted: int
    ) -> Verdict:
        params = LookaheadParams(0, max_emitted, 0)
        pages = BlockPages.allocate(1, 1, params, sampled.device)
        self._resize(pages, len(sampled), 0)
        return super().verify(tree, sampled, max_emitted)


REFERENCE = ReferenceOps()
