# SPDX-License-Identifier: Apache-2.0
import random

import pytest
import torch

from tests.core.build import Row, ints, make_batch
from tests.kernels.build import POISON, REFERENCE
from vllm_lookahead.core.batch import RequestBatch
from vllm_lookahead.core.verify import Verdict
from vllm_lookahead.triton_kernels.compact import LayerCaches, compact

# Name: a cache of [num_blocks, block_size, heads, width] from its storage.
LAYOUTS = {
    # vLLM 0.32 and later: K and V of a head side by side
    "LBNHC": lambda make: make((9, 8, 3, 16)),
    "LBHNC": lambda make: make((9, 3, 8, 16)).transpose(1, 2),
    "BLNHC": lambda make: make((9, 2, 8, 3, 16))[:, 1],
    "BHLNC": lambda make: make((9, 3, 2, 8, 16))[:, :, 0].transpose(1, 2),
    # before: K and V apart, inside or outside of the blocks
    "2BNHC": lambda make: make((2, 9, 8, 3, 8))[1],
    "B2NHC": lambda make: make((9, 2, 8, 3, 8))[:, 0],
    "odd width": lambda make: make((9, 8, 3, 5)),
    "padded width": lambda make: make((9, 8, 3, 17))[..., 1:],
    # the CPU's K: elements apart
    "BHCN": lambda make: make((9, 3, 16, 8)).permute(0, 3, 1, 2),
    "one head": lambda make: make((9, 8, 1, 2)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern, NaN among them."""
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.randint(-128, 128, (*shape[:-1], shape[-1] * size), dtype=torch.int8)
    return bits.view(dtype)


def bits_of(cache: torch.Tensor) -> torch.Tensor:
    return cache.contiguous().view(torch.int8)


def random_paths(n: int, accepted: list[int], most: int) -> Verdict:
    """Ascending paths, some of nodes that lie where they belong already."""
    paths = []
    for count in accepted:
        nodes = sorted(random.Random(count).sample(range(1, most), count))
        paths.append([0, *nodes, *[-1] * (n - 1 - count)])
    path = ints(paths)
    return Verdict(path, path, (path >= 0).sum(1, dtype=torch.int32))


def three_requests() -> tuple[RequestBatch, Verdict]:
    """Across block borders; everything accepted, one moved, none."""
    rows = [Row([7, 2, 5], 6, 0), Row([1, 4, 8], 7, 0), Row([3, 6, 0], 0, 0)]
    return make_batch(rows), random_paths(5, [4, 1, 0], most=16)


def assert_same_compaction(views, groups, batch, verdict, block_size):
    expected = [bits_of(view).view(*view.shape[:3], -1).clone() for view in views]
    REFERENCE.compact(expected, batch, verdict, block_size)
    for group in groups:
        compact(group, batch, verdict, block_size)
    for view, right in zip(views, expected, strict=True):
        assert torch.equal(bits_of(view), right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype):
    storages = []

    def make(shape):
        storages.append(random_bits(shape, dtype))
        return storages[-1]

    views = [LAYOUTS[layout](make) for _ in range(3)]
    before = [bits_of(storage).clone() for storage in storages]
    groups = LayerCaches.group(views)
    assert len(groups) == 1
    assert_same_compaction(views, groups, *three_requests(), 8)
    # Nothing but the accepted slots: write them back, and all is as it was.
    changed = sum(
        int((bits_of(s) != b).sum()) for s, b in zip(storages, before, strict=True)
    )
    per_slot = views[0][0, 0].numel() * views[0].element_size()
    assert 0 < changed <= 3 * 5 * per_slot


def test_bits_move_in_the_widest_integers():
    cache = random_bits((4, 8, 2, 64), torch.bfloat16)
    (whole,) = LayerCaches.group([cache])
    assert (whole.item, whole.num_heads, whole.width) == (8, 1, 32)
    (odd,) = LayerCaches.group([cache[..., 1:63]])
    assert (odd.item, odd.num_heads, odd.width) == (2, 2, 62)


def test_layers_of_two_geometries():
    views = [random_bits((9, 8, heads, 4), torch.float32) for heads in (2, 3, 2)]
    groups = LayerCaches.group(views)
    assert sorted(len(group.pointers) for group in groups) == [1, 2]
    assert_same_compaction(views, groups, *three_requests(), 8)


@pytest.mark.parametrize("n", [2, 16])
def test_many_moves(n):
    """A node's target is another's source: all are read before any is written."""
    rows = [Row([5, 0, 3, 1], 1, 0), Row([2, 4, 6, 7], 3, 0)]
    verdict = random_paths(n, [n - 1, n // 2], most=20)
    views = [random_bits((9, 8, 2, 16), torch.bfloat16) for _ in range(2)]
    groups = LayerCaches.group(views)
    assert_same_compaction(views, groups, make_batch(rows), verdict, 8)


def test_blocks_of_the_table_hold_several_of_the_cache():
    batch, verdict = three_requests()
    views = [random_bits((18, 4, 2, 16), torch.bfloat16)]
    expected = bits_of(views[0]).view(9, 8, -1).clone()
    REFERENCE.compact([expected], batch, verdict, 8)
    (group,) = LayerCaches.group(views)
    compact(group, batch, verdict, 8)
    assert torch.equal(bits_of(views[0]).view(9, 8, -1), expected)
    with pytest.raises(ValueError, match="no whole number"):
        compact(group, batch, verdict, 6)


def test_padding_moves_nothing():
    cache = random_bits((9, 8, 2, 16), torch.bfloat16)
    before = bits_of(cache).clone()
    (group,) = LayerCaches.group([cache])
    path = ints([[-1] * 5])
    batch = make_batch([Row([POISON], POISON, 0)])
    compact(group, batch, Verdict(path, path, ints([0])), 8)
    assert torch.equal(bits_of(cache), before)


def test_a_cache_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match="num_blocks, block_size, heads, width"):
        LayerCaches.group([torch.zeros(9, 8, 4)])
