# SPDX-License-Identifier: Apache-2.0
"""Tree attention against its reference, on shapes that are hard to get right."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from vllm_lookahead.triton_kernels import attention_config
from vllm_lookahead.triton_kernels.attention import tree_attention
from vllm_lookahead.triton_kernels.attention_config import (
    SplitScratch,
    TreeBatch,
    _config,
)
from vllm_lookahead.triton_kernels.attention_merged import merged_tree_attention
from vllm_lookahead.triton_kernels.attention_reference import (
    pack_bits,
    tree_attention_reference,
    unpack_bits,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PADDING = 3  # rows of no request
UNTOUCHED = 7.0


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    batch: TreeBatch
    scale: float

    def reference(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        b = self.batch
        return tree_attention_reference(
            self.q,
            self.k,
            self.v,
            b.query_start_loc,
            b.context_lens,
            b.block_table,
            b.ancestor_bits,
            self.scale,
            depths=b.depths,
            **options,
        )

    def run(self, splits: int = 1, **options) -> torch.Tensor:
        out = torch.full_like(self.q, UNTOUCHED)
        rows = splits * self.q.shape[0] * self.q.shape[1]
        scratch = SplitScratch.allocate(self.q.shape[2], self.q.device, rows)
        scratch.partial.fill_(torch.nan)
        scratch.lse.fill_(torch.nan)
        tree_attention(
            self.q,
            self.k,
            self.v,
            self.batch,
            out,
            self.scale,
            scratch=scratch,
            num_splits=splits,
            **options,
        )
        return out

    def check(self, splits: int = 1, **options) -> None:
        factors = {n: float(x) for n, x in options.items()}
        self.compare(self.run(splits, **options), self.reference(**factors)[0])

    def compare(self, out: torch.Tensor, expected: torch.Tensor) -> None:
        rows = self.q.shape[0] - PADDING
        close = TOLERANCE[out.dtype]
        out, padding = out[:rows].float(), out[rows:]
        torch.testing.assert_close(out, expected[:rows], rtol=close, atol=close)
        assert (padding == UNTOUCHED).all()


def make_case(
    sizes: list[int],
    contexts: list[int],
    heads: tuple[int, int] = (2, 1),
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    heads_first: bool = False,
    window: int = 0,
) -> Case:
    """Random trees on random caches; a request of size 0 is padding.

    Every slot that must not be read is NaN, every number that must not be, absurd.
    """
    torch.manual_seed(sum(sizes) + sum(contexts) + head_size)
    (hq, hkv), batch, widest = heads, len(sizes), max(sizes)
    ends = [c + s for c, s in zip(contexts, sizes, strict=True) if s]
    per_request = max(-(-end // block_size) for end in ends)
    num_blocks = batch * per_request + 1
    shape = [num_blocks, block_size, hkv, 2 * head_size]
    if heads_first:
        shape[1:3] = hkv, block_size
    cache = torch.full(shape, torch.nan)
    cache = cache.transpose(1, 2) if heads_first else cache
    table = torch.randperm(num_blocks - 1).view(batch, -1).int() + 1
    bits = torch.full((batch, widest, -(-widest // 32)), -1, dtype=torch.int32)
    depths = torch.full((batch, widest), 10**6, dtype=torch.int32)
    for b, (context, size) in enumerate(zip(contexts, sizes, strict=True)):
        if not size:
            continue
        first = max(0, context - window + 1) if window else 0
        slot = torch.arange(first, context + size)  # earlier blocks may be freed
        block = table[b, slot // block_size].long()
        cache[block, slot % block_size] = torch.randn(len(slot), hkv, 2 * head_size)
        seen = torch.eye(size, dtype=torch.bool)
        for i in range(1, size):  # mostly chains, some forks
            seen[i] |= seen[max(0, i - int(torch.randint(1, 5, ())))]
        bits[b, :size] = pack_bits(torch.nn.functional.pad(seen, (0, widest - size)))
        depths[b, :size] = seen.sum(1) - 1
    k, v = cache.to(cache_dtype or dtype).split(head_size, -1)
    return Case(
        torch.randn(sum(sizes) + PADDING, hq, head_size).to(dtype),
        k,
        v,
        TreeBatch(
            query_start_loc=torch.tensor([0, *sizes]).cumsum(0).int(),
            context_lens=torch.tensor(contexts).int(),
            block_table=table,
            ancestor_bits=bits,
            max_query_len=widest,
            depths=depths if window else None,
        ),
        head_size**-0.5,
    )


@pytest.mark.parametrize(
    "sizes, contexts",
    [
        ([1], [0]),
        ([1, 7, 1, 33, 0, 16], [0, 1, 17, 64, 999, 130]),
        ([3, 3, 3, 3, 3], [15, 16, 17, 63, 65]),
        ([31, 32, 33], [31, 32, 33]),
        ([64, 65], [64, 63]),
        ([128], [40]),
        ([150, 1], [5, 70]),
    ],
    ids=str,
)
def test_ragged_batches(sizes, contexts):
    make_case(sizes, contexts).check()


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 1), (14, 2), (8, 1), (32, 1)])
def test_grouped_heads(heads):
    make_case([20, 1], [30, 3], heads).check()


@pytest.mark.parametrize("head_size", [80, 96, 128, 256])
def test_head_sizes(head_size):
    make_case([9, 1], [70, 2], head_size=head_size).check(splits=2)


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_blocks_and_layouts(block_size, heads_first):
    case = make_case(
        [17, 2],
        [70, block_size],
        (2, 2),
        block_size=block_size,
        heads_first=heads_first,
    )
    case.check()


@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_splits(splits):
    """Of which some have nothing to do, and some nothing but tree."""
    make_case([40, 1, 0, 5], [300, 0, 9, 63]).check(splits)


def check_fp8(case: Case, splits: int) -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this GPU")
    factors = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([0.125])}
    case.check(splits, **factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    make_case([30, 1], [40, 65], dtype=dtype).check(splits=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_cache(dtype):
    case = make_case([30, 1], [40, 65], dtype=dtype, cache_dtype=torch.float8_e4m3fn)
    check_fp8(case, splits=2)


# Head size, block size, nodes and context of two requests: contexts that end a block,
# begin one, or end a tile of 64 inside of one.
LARGE = [
    (64, 16, [128, 2], [1023, 48]),
    (80, 32, [127, 1], [736, 33]),
    (96, 48, [97, 3], [528, 47]),
    (128, 64, [128, 1], [1024, 63]),
    (128, 16, [120, 5], [1424, 15]),
    (256, 128, [128, 3], [640, 127]),
]


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "fp8"])
@pytest.mark.parametrize("head_size, block_size, sizes, contexts", LARGE, ids=str)
def test_large_trees_on_long_contexts(
    head_size, block_size, sizes, contexts, precision
):
    fp8 = precision == "fp8"
    case = make_case(
        sizes,
        contexts,
        head_size=head_size,
        block_size=block_size,
        dtype=torch.bfloat16 if fp8 else getattr(torch, precision),
        cache_dtype=torch.float8_e4m3fn if fp8 else None,
        heads=(2, 1) if precision == "bfloat16" else (1, 1),
        heads_first=precision == "float16",
    )
    if fp8:
        check_fp8(case, splits=3)
    else:
        case.check(splits=1 if precision == "bfloat16" else 4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_soft_cap():
    case = make_case([20, 1], [40, 65])
    case.check(splits=2, softcap=0.5)
    case.q *= 1000  # where two exponentials would overflow
    case.check(softcap=20.0)


@pytest.mark.parametrize("window, splits", [(1, 1), (4, 2), (37, 3), (64, 1)])
def test_sliding_window_is_of_positions(window, splits):
    case = make_case([40, 1, 3], [100, 90, 5], window=window)
    case.check(splits, sliding_window=window, softcap=3.0)


@pytest.mark.parametrize("nothing", [torch.inf, -torch.inf])
def test_merged_with_a_context_part(nothing):
    """FlashAttention's versions differ in the LSE of an empty context."""
    case = make_case([20, 1, 3, 40], [0, 1, 70, 64])

    def context_attention(q, k, v, batch, out, scale, softcap):
        rows = q.shape[0] - PADDING
        part, lse = case.reference(softcap=softcap, see_tree=False)
        empty = lse[0, :rows].isinf()
        out[:rows] = part[:rows].masked_fill(empty[:, None, None], torch.nan)
        return lse.nan_to_num(neginf=nothing)

    out = torch.full_like(case.q, UNTOUCHED)
    run = partial(merged_tree_attention, case.q, case.k, case.v, case.batch, out)
    run(case.scale, softcap=30.0, context_attention=context_attention)
    case.compare(out, case.reference(softcap=30.0)[0])


def test_the_reference_of_each_part_merges_to_the_whole():
    case = make_case([4, 2], [20, 0])
    whole, lse = case.reference()
    parts = [case.reference(see_tree=False), case.reference(see_context=False)]
    weights = [
        (part_lse - lse).exp().nan_to_num(0).T[..., None] for _, part_lse in parts
    ]
    merged = sum(out * w for (out, _), w in zip(parts, weights, strict=True))
    torch.testing.assert_close(merged, whole)


def test_offsets_beyond_32_bits(monkeypatch):
    """Blocks farther apart than 2^31 elements, and heads inside of them too."""
    # Memory that is never touched takes no room, unless it is filled with NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = make_case([9], [20])
    far = 2**30 + 16
    num_blocks, block_size, heads, head_size = case.k.shape
    memory = torch.empty(num_blocks * far, dtype=torch.float16)
    strides = (far, 2 * head_size, block_size * 2 * head_size, 1)
    size = (num_blocks, block_size, heads, 2 * head_size)
    cache = memory.as_strided(size, strides)
    cache[:] = torch.cat([case.k, case.v], -1)
    k, v = cache.split(head_size, -1)
    replace(case, q=case.q.half(), k=k, v=v).check(splits=2)


def test_trees_may_change_after_capture():
    """What a CUDA graph replays: one launch, other lengths, contexts and blocks."""
    big, small = make_case([12, 12], [90, 90]), make_case([5, 1], [60, 3])
    batch = big.batch
    words = small.batch.ancestor_bits
    batch.query_start_loc.copy_(small.batch.query_start_loc)
    batch.context_lens.copy_(small.batch.context_lens)
    batch.ancestor_bits[:, : words.shape[1]] = words
    batch.block_table.fill_(-1)
    table = small.batch.block_table
    batch.block_table[:, : table.shape[1]] = table
    small = replace(small, batch=batch)
    small.check(splits=3)


def test_bits():
    seen = torch.rand(3, 70) < 0.5
    assert pack_bits(seen).shape == (3, 3)
    assert (unpack_bits(pack_bits(seen))[:, :70] == seen).all()


# An RTX 4090, an A100, an H200 and a B200.
@pytest.mark.parametrize("sms, splits", [(128, 4), (108, 3), (132, 4), (148, 4)])
def test_splits_fill_the_gpu_and_fit_the_scratch(monkeypatch, sms, splits):
    monkeypatch.setattr(attention_config, "num_sms", lambda: sms)
    splits_of = attention_config.default_splits
    scratch = SplitScratch.allocate(8, "cpu")
    for heads, group in ((32, 1), (8, 4), (1, 8)):
        for size in (1, 16, 60, 120, 512):
            for requests in (1, 2, 3, 8, 300):
                config = _config(128, group * size, 90)
                tiles = -(-size * group // config.block_m)
                programs = tiles * heads * requests
                found = splits_of(programs, config, 10**6)
                assert found >= 1
                assert found == 1 or programs < sms * 2
                rows = found * requests * size * heads * group
                assert found == 1 or rows <= scratch.lse.shape[0]
    assert splits_of(32, _config(128, 120, 90), 8192) == splits
    assert splits_of(32, _config(128, 120, 90), 100) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(4, 2, 64).int()}, "q must be one of"),
        ({"k": torch.zeros(3, 16, 1, 64)}, "differ in dtype, shape or strides"),
        ({"scale": -1.0}, "positive scales"),
        ({"sliding_window": 4}, "depths"),
        ({"query_len": 9}, "max_query_len"),
        ({"context_lens": torch.zeros(1, dtype=torch.int64)}, "context_lens"),
        ({"cache": torch.float8_e4m3fn}, "k_scale"),
    ],
    ids=str,
)
def test_refusals(change, message):
    case = make_case([1], [4], cache_dtype=change.pop("cache", None))
    options = {n: change.pop(n) for n in ("sliding_window",) if n in change}
    size = change.pop("query_len", 1)
    contexts = change.pop("context_lens", case.batch.context_lens)
    with pytest.raises(ValueError, match=message):
        batch = replace(case.batch, max_query_len=size, context_lens=contexts)
        replace(case, batch=batch, **change).run(**options)
