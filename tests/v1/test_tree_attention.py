# SPDX-License-Identifier: Apache-2.0
"""Tree attention against vLLM's own kernel, row by row, and against PyTorch."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from vllm import _custom_ops as ops

from vllm_lookahead.engine.v1.attention import kv_views, masked_attention, slot_views
from vllm_lookahead.numba_kernels.attention import TreeRows, tree_attention

needs_fast_exp = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(),
    reason="without AVX-512 vLLM's kernel takes exp from the C library",
)
CHAIN = [-1, 0, 1, 2, 3, 4, 5, 6]
BRANCHES = [-1, 0, 1, 2, 0, 4, 0, 6, 2, 8]
WINDOW = [-1, 0, 1, *range(27)]


@dataclass
class Case:
    """Trees over a cache whose unused slots are NaN; some rows are no tree's."""

    query: torch.Tensor
    cache: torch.Tensor
    trees: TreeRows
    parents: list[list[int]]
    scale: float


def make_case(
    parents: list[list[int]],
    contexts: list[int],
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    torch.manual_seed(sum(contexts) + head_size)
    sizes = [len(p) for p in parents]
    blocks = [-(-(c + n) // block_size) for c, n in zip(contexts, sizes, strict=True)]
    physical = torch.randperm(sum(blocks) + 2).int()
    cache = torch.full(
        (len(physical), heads[1], block_size, 2 * head_size), torch.nan, dtype=dtype
    )
    tables = np.zeros((len(parents), max(blocks)), np.int32)
    used, first_row, row = 0, [], 1
    slots = slot_views(cache)
    for b, count in enumerate(blocks):
        tables[b, :count] = physical[used : used + count]
        used += count
        first_row.append(row)
        row += sizes[b] + 1
        for position in range(contexts[b] + sizes[b]):
            at = tables[b, position // block_size], position % block_size
            for view in slots:
                view[at] = 2 * torch.randn(heads[1], head_size)
    widest = max(sizes)
    sees = np.zeros((len(parents), widest, widest), np.bool_)
    depths = np.zeros((len(parents), widest), np.int32)
    for b, tree in enumerate(parents):
        for node, parent in enumerate(tree):
            if parent >= 0:
                sees[b, node], depths[b, node] = sees[b, parent], depths[b, parent] + 1
            sees[b, node, node] = True
    trees = TreeRows(
        np.array(first_row),
        np.array(sizes, np.int32),
        np.array(contexts, np.int32),
        tables,
        sees,
        depths,
        covers_batch=False,
    )
    query = 2 * torch.randn(row, heads[0], head_size)
    return Case(query.to(dtype), cache, trees, parents, head_size**-0.5)


def plain_decode(case: Case, b: int, node: int) -> torch.Tensor:
    """vLLM's kernel for a node whose ancestors' K/V lies behind the context."""
    path = [node]
    while (parent := case.parents[b][path[0]]) >= 0:
        path.insert(0, parent)
    cache, context = case.cache.clone(), int(case.trees.position[b])
    block_size, table = cache.shape[2], case.trees.block_table[b]
    for view in slot_views(cache):
        for depth, ancestor in enumerate(path):
            source, target = context + ancestor, context + depth
            view[table[target // block_size], target % block_size] = view[
                table[source // block_size], source % block_size
            ].clone()
    length = context + len(path)
    for view in slot_views(cache):  # unused slots hold numbers in a real cache
        view.nan_to_num_(0.0)
    row = int(case.trees.first_row[b]) + node
    query = case.query[row : row + 1]
    start = torch.tensor([0, 1], dtype=torch.int32)
    seq_lens = torch.tensor([length], dtype=torch.int32)
    num_heads, head_size = query.shape[1:]
    isa = "vec" if block_size % 32 == head_size % 32 == 0 else "vec16"
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=num_heads,
        num_kv_heads=cache.shape[1],
        head_dim=head_size,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        kv_cache_dtype="auto",
        dynamic_causal=None,
    )
    keys, values = cache.view(*cache.shape[:2], 2 * block_size, -1).chunk(2, 2)
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query, keys, values, out, start, seq_lens, case.scale, True, None, -1,
        torch.from_numpy(table)[None], 0, metadata, None,
    )  # fmt: skip
    return out[0]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CASES = {
    "chain": make_case([CHAIN], [100]),
    "branches": make_case([BRANCHES], [300]),
    "no context but the first token": make_case([BRANCHES], [1]),
    "window": make_case([WINDOW], [61]),
    "across blocks": make_case([BRANCHES, CHAIN], [30, 64]),
    "large blocks": make_case([BRANCHES], [200], block_size=128),
    "a long context": make_case([[-1, 0, 0]], [6000], block_size=128),
    "small blocks": make_case([BRANCHES], [40], block_size=16),
    "multi-head": make_case([BRANCHES], [50], heads=(3, 3), head_size=96),
    "multi-query": make_case([BRANCHES, WINDOW], [50, 3], heads=(8, 1), head_size=32),
    "head size 80": make_case([BRANCHES], [50], head_size=80),
    "float32": make_case([BRANCHES], [90], dtype=torch.float32),
    "float16": make_case([BRANCHES], [90], dtype=torch.float16),
}


@needs_fast_exp
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_node_attends_as_plain_decoding_would(case: Case) -> None:
    """To the last bit, wherever in the tree it lies."""
    out = torch.zeros_like(case.query)
    tree_attention(case.query, case.cache, case.trees, case.scale, out)
    for b, parents in enumerate(case.parents):
        for node in range(len(parents)):
            row = int(case.trees.first_row[b]) + node
            assert torch.equal(out[row], plain_decode(case, b, node)), (b, node)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_implementations_agree(case: Case) -> None:
    out, expected = torch.full_like(case.query, 7), torch.full_like(case.query, 7)
    tree_attention(case.query, case.cache, case.trees, case.scale, out)
    masked_attention(
        case.query, *kv_views(case.cache), case.trees, case.scale, 0.0, expected
    )
    tolerance = 1e-5 if case.query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    outside = torch.ones(len(out), dtype=torch.bool)
    for b, first in enumerate(case.trees.first_row):
        outside[first : first + case.trees.num_nodes[b]] = False
    assert outside.any() and (out[outside] == 7).all()


def test_soft_cap() -> None:
    """Scores are bounded before the mask, as vLLM bounds them."""
    case = CASES["float32"]
    one, other = torch.empty_like(case.query), torch.empty_like(case.query)
    views = kv_views(case.cache)
    masked_attention(case.query, *views, case.trees, case.scale, 1e6, one)
    masked_attention(case.query, *views, case.trees, case.scale, 0.0, other)
    rows = slice(1, 1 + len(BRANCHES))
    torch.testing.assert_close(one[rows], other[rows], atol=1e-3, rtol=1e-3)
    masked_attention(case.query, *views, case.trees, case.scale, 1e-6, one)
    keys, values = views
    for node in range(len(BRANCHES)):
        sees = torch.from_numpy(case.trees.sees[0, node])
        slots = torch.cat([torch.ones(90, dtype=torch.bool), sees])
        table = torch.from_numpy(case.trees.block_table[0]).long()
        flat = values[table].transpose(0, 1).flatten(1, 2)[:, :100]
        mean = flat[:, slots].mean(1).repeat_interleave(2, 0)
        torch.testing.assert_close(one[1 + node], mean, atol=1e-3, rtol=1e-3)
