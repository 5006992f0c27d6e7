# SPDX-License-Identifier: Apache-2.0
"""Tree attention in PyTorch, one request at a time: what the kernels must say."""

import torch


def unpack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Packed ancestor bits [..., W] int32 as [..., 32 * W] bool."""
    shift = torch.arange(32, device=bits.device, dtype=torch.int32)
    return (bits[..., None] >> shift & 1).bool().flatten(-2)


def pack_bits(seen: torch.Tensor) -> torch.Tensor:
    """[..., T] bool as packed int32 words [..., ceil(T/32)]."""
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 32))
    words = padded.unflatten(-1, (-1, 32)).long()
    shift = torch.arange(32, device=seen.device)
    return (words << shift).sum(-1).to(torch.int32)  # keeps the low 32 bits


def tree_attention_reference(
    q: torch.Tensor,  # [N, Hq, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,  # as k_cache
    query_start_loc: torch.Tensor,  # [B+1]
    context_lens: torch.Tensor,  # [B]
    block_table: torch.Tensor,  # [B, max_blocks]
    ancestor_bits: torch.Tensor,  # [B, T, ceil(T/32)] int32
    scale: float,
    *,
    depths: torch.Tensor | None = None,  # [B, T], for a sliding window
    softcap: float = 0.0,
    sliding_window: int = 0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    see_context: bool = True,
    see_tree: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every tree node over the context, its ancestors and itself.

    `see_context=False` and `see_tree=False` leave one part out.

    Returns:
        out: [N, Hq, D] float32, zeros where a row sees nothing.
        lse: [Hq, N] float32, natural log; -inf where a row sees nothing.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    block_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for b, context in enumerate(context_lens.tolist()):
        rows = slice(*query_start_loc[b : b + 2].tolist())
        size = rows.stop - rows.start
        if not size:  # padding, of which nothing else may be read
            continue
        slot = torch.arange(context + size, device=q.device)
        block = block_table[b, slot // block_size].long()

        def read(cache: torch.Tensor, factor: float) -> torch.Tensor:
            kv = cache[block, slot % block_size].float() * factor  # noqa: B023
            return kv.repeat_interleave(group, 1)  # [context + size, Hq, D]

        k, v = read(k_cache, k_scale), read(v_cache, v_scale)
        score = torch.einsum("thd,shd->hts", q[rows].float(), k) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        tree = unpack_bits(ancestor_bits[b, :size])[:, :size] & see_tree
        seen = torch.cat([tree.new_full((size, context), see_context), tree], 1)
        if sliding_window and depths is not None:
            depth = depths[b, :size].long()
            position = torch.cat([slot[:context], context + depth])
            seen &= (context + depth)[:, None] - position < sliding_window
        score.masked_fill_(~seen, -torch.inf)
        v[~seen.any(0)] = 0  # not NaN, which a zero weight would let through
        lse[:, rows] = score.logsumexp(-1)
        weight = score.softmax(-1).nan_to_num(0)  # a row that sees nothing
        out[rows] = torch.einsum("hts,shd->thd", weight, v)
    return out, lse
