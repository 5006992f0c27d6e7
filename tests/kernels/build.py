# SPDX-License-Identifier: Apache-2.0
"""What the kernel tests start from: random trees, poisoned memory."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tests.core.build import ints, make_tree
from tests.core.equivalence import Shape, State, random_hints
from vllm_lookahead.core.batch import Request, RequestBatch
from vllm_lookahead.core.draft.estimate import WEIGHTS, Hints
from vllm_lookahead.core.draft.window import add_window
from vllm_lookahead.core.pages import EMPTY, BlockPages
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
    last = (batch.position + ahead).clamp(min=0)  # the first block has the window
    dead = columns * block_size > last[:, None]
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


def merge(chains: Sequence[Sequence[int]], request: Request) -> list[Node]:
    """The root and chains below it, each up to EMPTY; common prefixes share nodes."""
    nodes = [Node(request.root, EMPTY, 0, ROOT)]
    index: dict[tuple[int, ...], int] = {(): 0}
    for chain in chains:
        for depth in range(1, [*chain, EMPTY].index(EMPTY) + 1):
            path = tuple(chain[:depth])
            if path not in index and len(nodes) < request.max_nodes:
                index[path] = len(nodes)
                nodes.append(Node(path[-1], index[path[:-1]], depth, CANDIDATE))
    return nodes


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
        rows = window[: request.ngram_size - 1]
        own = [row[: request.window_size] for row in rows]
        nodes = merge(chains, request)
        trees.append(add_window(nodes, own, request.max_nodes))
    return DraftTree.of(trees, size)


def random_draft(state: State, shape: Shape, seed: int) -> DraftTree:
    """The reference's trees, of random hints."""
    hints = random_hints(shape, state.n, seed)
    tree, _ = REFERENCE.draft(state.pages, state.batch, hints, state.g)
    return tree


class AnySizeTritonOps(TritonOps):
    """`TritonOps` that takes its sizes from what each op is given."""

    def __init__(self) -> None:
        self._caches = []

    def _resize(self, pages: BlockPages, b: int, g: int, rows: int = 1) -> None:
        _, k, columns = pages.window.shape
        params, device = LookaheadParams(columns, k + 1, g), pages.window.device
        super().__init__(params, b, device, max_rows=rows)
        tables = vars(self._tables).values()  # whose cells no launch has filed
        scratch = vars(self._scratch).values()
        for buffer in (*vars(self).values(), *tables, *scratch):
            for tensor in buffer if isinstance(buffer, list) else [buffer]:
                if isinstance(tensor, torch.Tensor):
                    tensor.fill_(POISON)

    def draft(
        self,
        pages: BlockPages,
        batch: RequestBatch,
        hints: Hints,
        max_candidates: int,
        weights: Mapping[str, float] = WEIGHTS,
    ) -> tuple[DraftTree, torch.Tensor]:
        self._resize(pages, len(batch.root), max_candidates)
        return super().draft(pages, batch, hints, max_candidates, weights)

    def verify(
        self, tree: DraftTree, sampled: torch.Tensor, max_emitted: int
    ) -> Verdict:
        params = LookaheadParams(0, max_emitted, 0)
        pages = BlockPages.allocate(1, 1, params, sampled.device)
        self._resize(pages, len(sampled), 0)
        return super().verify(tree, sampled, max_emitted)

    def likeliest_tokens(
        self, logits: torch.Tensor, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages = BlockPages.allocate(1, 1, LookaheadParams(0, 2, 0), logits.device)
        self._resize(pages, 1, 0, first + len(logits) + 1)
        return super().likeliest_tokens(logits, first)


REFERENCE = ReferenceOps()
