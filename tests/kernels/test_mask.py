# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tests.core.build import ints
from tests.kernels.build import POISON, poisoned, random_trees
from vllm_lookahead.core.mask import ancestors
from vllm_lookahead.core.tree import DraftTree
from vllm_lookahead.triton_kernels.mask import build_mask

COLUMNS = "tokens", "parents", "depths", "kinds"


def unpack(bits: torch.Tensor) -> torch.Tensor:
    """[B, T, WORDS] int32 to [B, T, WORDS * 32] bool."""
    return (bits[..., None] >> torch.arange(32) & 1).bool().flatten(2)


def mask_of(tree: DraftTree, position: list[int], lengths: list[int], tokens: int):
    """Bits, positions and input ids, of requests that many tokens long."""
    b, t = tree.tokens.shape
    start = ints([0, *lengths]).cumsum(0, dtype=torch.int32)
    bits = poisoned(b, t, -(-t // 32))
    positions = poisoned(tokens, dtype=torch.int64)
    input_ids = poisoned(tokens)
    build_mask(tree, ints(position), start, bits, positions, input_ids)
    return bits, positions, input_ids


@pytest.mark.parametrize(
    ("sizes", "columns", "max_depth"),
    [
        ([1], 1, 0),
        ([1, 0, 2], 2, 4),
        ([31, 32, 33, 1], 33, 5),
        ([128, 120, 5], 128, 18),
        ([280], 280, 27),
        ([64], 64, 63),  # one chain may be this deep
        ([512, 7], 512, 78),
    ],
)
def test_bits_and_positions_of_ragged_trees(sizes, columns, max_depth):
    tree = random_trees(sizes, columns, max_depth, seed=sum(sizes))
    position = [7 + 100_000 * b for b in range(len(sizes))]
    tokens = sum(sizes) + 3
    bits, positions, input_ids = mask_of(tree, position, sizes, tokens)

    seen, start = unpack(bits), 0
    for b, size in enumerate(sizes):
        one = DraftTree(
            *(getattr(tree, name)[b : b + 1, :size] for name in COLUMNS),
            tree.num_nodes[b : b + 1],
        )
        if size:
            assert torch.equal(seen[b, :size, :size], ancestors(one)[0])
        assert not seen[b, size:].any()
        assert not seen[b, :, size:].any()
        flat = slice(start, start + size)
        assert torch.equal(positions[flat], (position[b] + one.depths[0]).long())
        assert torch.equal(input_ids[flat], one.tokens[0])
        start += size
    assert (positions[start:] == POISON).all()
    assert (input_ids[start:] == POISON).all()


def test_other_tokens_of_the_flat_batch_stay_as_they_are():
    """Trees cut short in the batch, and a request with more tokens than its tree."""
    tree = random_trees([5, 3, 4], 5, 3, seed=1)
    _, positions, input_ids = mask_of(tree, [10, 20, 30], [2, 6, 3], tokens=12)
    depths = tree.depths.tolist()
    expected = [10 + d for d in depths[0][:2]]
    expected += [20 + d for d in depths[1][:3]] + [POISON] * 3
    expected += [30 + d for d in depths[2][:3]] + [POISON]
    assert positions.tolist() == expected
    assert (input_ids == POISON).tolist() == [e == POISON for e in expected]


def test_rows_of_a_larger_buffer():
    """A tree's columns may be a slice: rows apart, as the reference makes them."""
    tree = random_trees([6, 4], 9, 3, seed=2)
    narrow = DraftTree(
        *(getattr(tree, name)[:, :6] for name in COLUMNS),
        tree.num_nodes,
    )
    bits, *_ = mask_of(narrow, [0, 0], [6, 4], tokens=10)
    wide_bits, *_ = mask_of(tree, [0, 0], [6, 4], tokens=10)
    assert torch.equal(bits, wide_bits[:, :6])
