# SPDX-License-Identifier: Apache-2.0
"""Attention at one shape: ours, and what it is measured against.

A contender is made for a problem and is then a call without arguments, so that a
CUDA graph can hold it. It raises `Unavailable` where it cannot run, and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

import torch

from vllm_lookahead.triton_kernels.attention import tree_attention
from vllm_lookahead.triton_kernels.attention_config import SplitScratch, TreeBatch
from vllm_lookahead.triton_kernels.attention_merged import merged_tree_attention
from vllm_lookahead.triton_kernels.attention_reference import (
    pack_bits,
    tree_attention_reference,
)


class Unavailable(Exception):
    """Why a contender cannot run here."""


@dataclass(frozen=True)
class Shape:
    size: int  # T, nodes of a tree
    context: int
    num_heads: int = 32
    num_kv_heads: int = 32
    head_size: int = 128
    block_size: int = 16
    requests: int = 1
    dtype: str = "bfloat16"

    @property
    def kv_bytes(self) -> int:
        end = (self.context + self.size) * self.requests
        return 4 * end * self.num_kv_heads * self.head_size


def chains_of_four(size: int) -> torch.Tensor:
    """[T, T] bool: chains under one root."""
    seen = torch.eye(size, dtype=torch.bool)
    for node in range(1, size):
        seen[node] |= seen[0 if node % 4 == 1 else node - 1]
    return seen


@dataclass
class Problem:
    """One layer's tensors; `tree` is shared by all requests and layers."""

    shape: Shape
    device: str
    q: torch.Tensor = field(init=False)  # [N, Hq, D]
    k: torch.Tensor = field(init=False)  # [num_blocks, block_size, Hkv, D]
    v: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)  # [N, Hq, D]
    tree: torch.Tensor = field(init=False)  # [T, T] bool
    batch: TreeBatch = field(init=False)
    scratch: SplitScratch = field(init=False)

    def __post_init__(self) -> None:
        s, device = self.shape, self.device
        dtype, rows = getattr(torch, s.dtype), s.size * s.requests
        per_request = -(-(s.context + s.size) // s.block_size)
        num_blocks = s.requests * per_request
        # vLLM's cache: logically heads before slots, slots first in memory.
        cache = torch.randn(
            num_blocks,
            s.block_size,
            s.num_kv_heads,
            2 * s.head_size,
            dtype=dtype,
            device=device,
        )
        self.k, self.v = cache.split(s.head_size, -1)
        self.q = torch.randn(rows, s.num_heads, s.head_size, dtype=dtype, device=device)
        self.out = torch.empty_like(self.q)
        self.tree = chains_of_four(s.size).to(device)
        ints = {"dtype": torch.int32, "device": device}
        table = torch.randperm(num_blocks, device=device).view(s.requests, -1)
        self.batch = TreeBatch(
            query_start_loc=torch.arange(0, rows + 1, s.size, **ints),
            context_lens=torch.full((s.requests,), s.context, **ints),
            block_table=table.int(),
            ancestor_bits=pack_bits(self.tree).expand(s.requests, -1, -1).contiguous(),
            max_query_len=s.size,
            max_context_len=s.context,
        )
        self.scratch = SplitScratch.allocate(s.head_size, device)

    @property
    def scale(self) -> float:
        return self.shape.head_size**-0.5

    @property
    def seq_lens(self) -> torch.Tensor:
        return self.batch.context_lens + self.shape.size

    def reference(self) -> torch.Tensor:
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
        )[0]

    def contiguous_kv(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V out of their pages: [B, S, Hkv, D]."""
        end = self.shape.context + self.shape.size
        table = self.batch.block_table.long()
        return self.k[table].flatten(1, 2)[:, :end], self.v[table].flatten(1, 2)[
            :, :end
        ]

    def mask(self) -> torch.Tensor:
        """[T, S] bool over the context and the tree."""
        context = self.tree.new_ones(self.shape.size, self.shape.context)
        return torch.cat([context, self.tree], 1)


Contender = Callable[[Problem], Callable[[], torch.Tensor]]


def ours(p: Problem) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        tree_attention(p.q, p.k, p.v, p.batch, p.out, p.scale, scratch=p.scratch)
        return p.out

    return call


def merged(p: Problem) -> Callable[[], torch.Tensor]:
    _flash()

    def call() -> torch.Tensor:
        merged_tree_attention(p.q, p.k, p.v, p.batch, p.out, p.scale)
        return p.out

    return call


def _flash() -> tuple[Callable[..., torch.Tensor], int]:
    if not torch.cuda.is_available():
        raise Unavailable("FlashAttention needs a GPU")
    try:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )
    except ImportError as error:
        raise Unavailable(f"no FlashAttention in this vLLM: {error}") from error
    return flash_attn_varlen_func, get_flash_attn_version() or 2


def flash_version() -> int | None:
    """Of FlashAttention here, if there is one."""
    try:
        return _flash()[1]
    except Unavailable:
        return None


def flash_causal(p: Problem) -> Callable[[], torch.Tensor]:
    """Not the same numbers: the yardstick is a chain of as many tokens."""
    flash, version = _flash()
    seq_lens = p.seq_lens

    def call() -> torch.Tensor:
        return flash(
            q=p.q,
            k=p.k,
            v=p.v,
            out=p.out,
            cu_seqlens_q=p.batch.query_start_loc,
            max_seqlen_q=p.shape.size,
            seqused_k=seq_lens,
            max_seqlen_k=p.shape.context + p.shape.size,
            block_table=p.batch.block_table,
            softmax_scale=p.scale,
            causal=True,
            fa_version=version,
        )

    return call


def unified(p: Problem) -> Callable[[], torch.Tensor]:
    if not torch.cuda.is_available():
        raise Unavailable("vLLM's Triton kernels need a GPU")
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    bias = torch.zeros_like(p.tree, dtype=torch.float32)
    bias.masked_fill_(~p.tree, -torch.inf)
    seq_lens = p.seq_lens

    def call() -> torch.Tensor:
        unified_attention(
            q=p.q,
            k=p.k,
            v=p.v,
            out=p.out,
            cu_seqlens_q=p.batch.query_start_loc,
            max_seqlen_q=p.shape.size,
            seqused_k=seq_lens,
            max_seqlen_k=p.shape.context + p.shape.size,
            softmax_scale=p.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=p.batch.block_table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            qq_bias=bias,
        )
        return p.out

    return call


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(p: Problem) -> Callable[[], torch.Tensor]:
    """On K and V out of their pages, which favours it."""
    if not torch.cuda.is_available():
        raise Unavailable("FlexAttention compiles for a GPU")
    from torch.nn.attention.flex_attention import create_block_mask

    s, tree = p.shape, p.tree
    end = s.context + s.size

    def sees(batch, head, query, key):
        return (key < s.context) | tree[query, (key - s.context).clamp(min=0)]

    mask = create_block_mask(sees, None, None, s.size, end, device=p.device)
    k, v = (x.transpose(1, 2).contiguous() for x in p.contiguous_kv())
    q = p.q.view(s.requests, s.size, s.num_heads, -1).transpose(1, 2)
    compiled = _compiled_flex()
    gqa = s.num_heads != s.num_kv_heads

    def call() -> torch.Tensor:
        out = compiled(q, k, v, block_mask=mask, scale=p.scale, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def xformers(p: Problem) -> Callable[[], torch.Tensor]:
    """On K and V out of their pages, one per query head, which favours it."""
    try:
        attend = import_module("xformers.ops").memory_efficient_attention
    except ImportError as error:
        raise Unavailable("xformers is not installed") from error

    s = p.shape
    end, group = s.context + s.size, s.num_heads // s.num_kv_heads
    k, v = (x.repeat_interleave(group, 2).contiguous() for x in p.contiguous_kv())
    q = p.q.view(s.requests, s.size, s.num_heads, -1)
    # Its kernels want rows of the bias aligned to 8.
    bias = q.new_zeros(s.size, -(-end // 8) * 8)[:, :end]
    bias.masked_fill_(~p.mask(), -torch.inf)
    bias = bias.expand(s.requests, s.num_heads, -1, -1)

    def call() -> torch.Tensor:
        out = attend(q, k, v, attn_bias=bias, scale=p.scale)
        return out.flatten(0, 1)

    return call


CONTENDERS: dict[str, Contender] = {
    "tree": ours,
    "merged": merged,
    "flash_causal": flash_causal,
    "unified_qq_bias": unified,
    "flex": flex,
    "xformers": xformers,
}
APPROXIMATE = {"flash_causal"}  # of another mask


def max_error(p: Problem, out: torch.Tensor) -> float:
    return (out.float() - p.reference()).abs().max().item()
