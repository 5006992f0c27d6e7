# SPDX-License-Identifier: Apache-2.0
"""Sample and match on random trees, and moving the accepted K/V into place."""

import random

import pytest
import torch

from tests.core.build import Row, ints, make_batch, make_tree
from tests.core.plain_python import walk
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.pages import EMPTY
from vllm_lookahead.core.tree import CANDIDATE, ROOT, WINDOW, Node
from vllm_lookahead.core.verify import Verdict


def random_tree(rng: random.Random, size: int, vocab: int) -> list[Node]:
    """Any tree: candidates and other kinds mixed, candidate siblings distinct."""
    nodes = [Node(rng.randrange(vocab), EMPTY, 0, ROOT)]
    while len(nodes) < size:
        # A small reach backwards makes deep trees.
        parent = max(0, len(nodes) - rng.choice([1, 1, 2, 5, size]))
        token, kind = rng.randrange(vocab), rng.choice([CANDIDATE] * 3 + [WINDOW])
        taken = {n.token for n in nodes if n.parent == parent and n.kind == CANDIDATE}
        if kind == CANDIDATE and token in taken:
            kind = WINDOW
        depth = nodes[parent].depth + 1
        nodes.append(Node(token, parent, depth, kind))
    return nodes


def assert_verdict(verdict: Verdict, trees, sampled, max_emitted: int) -> None:
    for b, nodes in enumerate(trees):
        tokens, path = walk(nodes, sampled[b].tolist(), max_emitted)
        rest = [EMPTY] * (max_emitted - len(path))
        assert verdict.tokens[b].tolist() == tokens + rest
        assert verdict.path[b].tolist() == path + rest
        assert verdict.num_emitted[b] == len(path)


@pytest.mark.parametrize("max_emitted", [2, 3, 5, 8])
@pytest.mark.parametrize("vocab", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_walk_on_random_trees(ops, max_emitted, vocab, dtype):
    rng = random.Random(max_emitted * 10 + vocab)
    trees = [random_tree(rng, size, vocab) for size in range(1, 33)]
    tree = make_tree(trees)
    lengths = set()
    for _ in range(4):
        cells = [[rng.randrange(vocab) for _ in row] for row in tree.tokens]
        sampled = torch.tensor(cells, dtype=dtype)
        verdict = ops.verify(tree, sampled, max_emitted)
        assert verdict.tokens.dtype == verdict.path.dtype == torch.int32
        assert_verdict(verdict, trees, sampled, max_emitted)
        lengths |= set(verdict.num_emitted.tolist())
    assert lengths >= {1, 2}


def chain(tokens: list[int], kind: int = CANDIDATE) -> list[Node]:
    nodes = [Node(0, EMPTY, 0, ROOT)]
    for i, token in enumerate(tokens):
        nodes.append(Node(token, i, i + 1, kind))
    return nodes


@pytest.mark.parametrize("n", range(2, 9))
def test_a_chain_that_matches_up_to_each_length(ops, n):
    values = list(range(10, 10 + n - 1))
    tree = make_tree([chain(values)] * n)
    sampled = torch.full((n, n), 99, dtype=torch.int32)
    for matched in range(n):
        sampled[matched, :matched] = ints(values[:matched])
    verdict = ops.verify(tree, sampled, n)
    # A full match, the last row, emits the bonus token as well: N in all.
    assert verdict.num_emitted.tolist() == list(range(1, n + 1))
    for matched in range(n):
        emitted = verdict.tokens[matched, : matched + 1].tolist()
        assert emitted == [*values[:matched], 99]
        assert verdict.path[matched, : matched + 1].tolist() == [*range(matched + 1)]


def test_only_candidates_are_verified(ops):
    tree = make_tree([chain([5, 6], WINDOW), chain([5, 6], CANDIDATE)])
    sampled = ints([[5, 6, 7]] * 2)
    assert ops.verify(tree, sampled, 3).num_emitted.tolist() == [1, 3]


def test_any_token_id_is_an_ordinary_token(ops):
    """0, and ids that are some model's EOS: ending a text is the engine's part."""
    for token in (0, 2, 151_645, 2**31 - 1):
        verdict = ops.verify(make_tree([chain([token] * 3)]), ints([[token] * 4]), 4)
        assert verdict.tokens.tolist() == [[token] * 4]


# Accepted paths of one step: the first chain, later chains, neighbours, a jump
# over block borders, no match at all.
PATHS = [[0, 1, 2, 3], [0, 4, 5, 6], [0, 2, 3, 4], [0, 1, 9, 30], [0, 31], [0]]
LAYOUTS = {
    # name: (shape of the memory for N blocks of S slots, permutation to [N, S, ...])
    "plain": ("NSHD", "NSHD"),
    "k of the CPU cache": ("NHDS", "NSHD"),
    "v of the CPU cache": ("NHSD", "NSHD"),
    "heads first": ("HNSD", "NSHD"),
    "block last": ("SDHN", "NSHD"),
}


def make_caches(num_blocks: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """A NaN-filled cache of each layout, and K and V interleaved in one."""
    lengths = {"N": num_blocks, "S": size, "H": 3, "D": 4}
    caches = []
    for memory, view in LAYOUTS.values():
        cache = torch.full([lengths[c] for c in memory], torch.nan, dtype=dtype)
        caches.append(cache.permute([memory.index(c) for c in view]))
    both = torch.full((num_blocks, 2, size, 3, 4), torch.nan, dtype=dtype)
    return [*caches, both[:, 0], both[:, 1], caches[0].clone()[:, :, :1, ::2]]


def make_verdict(paths: list[list[int]], n: int) -> Verdict:
    padded = [path + [EMPTY] * (n - len(path)) for path in paths]
    tokens = [[EMPTY if i == EMPTY else 100 + i for i in path] for path in padded]
    return Verdict(ints(tokens), ints(padded), ints([len(path) for path in paths]))


def batch_at(positions: list[int], size: int, seed: int) -> tuple[RequestBatch, int]:
    """Requests with room for 32 nodes each, in blocks handed out at random."""
    per_request = (max(positions) + 32) // size + 1
    num_blocks = per_request * len(positions) + 2
    order = random.Random(seed).sample(range(num_blocks), num_blocks)
    rows = [
        Row([order.pop() for _ in range(per_request)], position, root=1)
        for position in positions
    ]
    return make_batch(rows, filler=order[0]), num_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("position", [1, 14, 15, 16, 17, 31, 32, 40])
def test_compaction_moves_the_accepted_and_nothing_else(ops, position, size, dtype):
    positions = [position + i for i in range(len(PATHS))]
    batch, num_blocks = batch_at(positions, size, position)
    caches = make_caches(num_blocks, size, dtype)
    torch.manual_seed(0)

    def slot(b: int, at: int) -> tuple[int, int]:
        return int(batch.block_table[b, at // size]), at % size

    # Everything that a step leaves: the context, the root, the nodes of the tree.
    for cache in caches:
        for b, p in enumerate(positions):
            for at in range(p + max(PATHS[b]) + 1):
                cache[slot(b, at)] = torch.randn(cache.shape[2:]).to(dtype)
    expected = [cache.clone() for cache in caches]
    for cache, after in zip(caches, expected, strict=True):
        for b, (p, path) in enumerate(zip(positions, PATHS, strict=True)):
            for depth, node in enumerate(path):
                after[slot(b, p + depth)] = cache[slot(b, p + node)]

    ops.compact(caches, batch, make_verdict(PATHS, 4), size)

    for cache, after in zip(caches, expected, strict=True):
        assert torch.equal(cache.isnan(), after.isnan())
        assert torch.equal(cache.nan_to_num(), after.nan_to_num())
    for b, (p, path) in enumerate(zip(positions, PATHS, strict=True)):
        for at in range(p + len(path)):
            assert not any(cache[slot(b, at)].isnan().any() for cache in caches)


def test_compaction_in_place_when_moves_overlap(ops):
    """A slot is the target of one move and the source of the next, up to N = 16."""
    path = list(range(0, 32, 2))
    batch, num_blocks = batch_at([16 - 3], 16, 0)
    cache = torch.full((num_blocks, 16), torch.nan)
    table = batch.block_table[0].tolist()
    for node in range(32):
        at = 13 + node
        cache[table[at // 16], at % 16] = node
    ops.compact([cache], batch, make_verdict([path], 16), 16)
    moved = [cache[table[at // 16], at % 16].item() for at in range(13, 13 + 16)]
    assert moved == path


def test_compaction_of_nothing_touches_nothing(ops):
    batch, num_blocks = batch_at([5, 20], 16, 0)
    cache = torch.randn(num_blocks, 16, 2)
    before = cache.clone()
    ops.compact([cache], batch, make_verdict([[0], [0, 1, 2]], 4), 16)
    assert torch.equal(cache, before)
    ops.compact([], batch, make_verdict([[0, 3], [0]], 4), 16)
