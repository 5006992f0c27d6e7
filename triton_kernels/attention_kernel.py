# SPDX-License-Identifier: Apache-2.0
"""The kernels of tree attention; `attention.tree_attention` launches them."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _ancestor_word(
    bits_ptr,  # [BLOCK_M] first word of each row
    at,  # which word; before the first lies the context
    exists,  # [BLOCK_M]
    num_columns,
):
    """[BLOCK_M] uint32: whether a row sees each of 32 columns of the tree."""
    index = tl.where(exists, at, -1)
    used = (index >= 0) & (index * 32 < num_columns)
    bits = tl.load(bits_ptr + index, mask=used, other=0)
    return tl.where(at < 0, -1, bits).to(tl.uint32, bitcast=True)


# A step's sizes, which would otherwise be compiled in where they are 1 or round.
@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def tree_attention_kernel(
    q_ptr,  # [N, Hq, D]
    k_ptr,  # [num_blocks, block_size, Hkv, D]
    v_ptr,  # as k_ptr
    out_ptr,  # [N, Hq, D], or [num_splits, N, Hq, D] float32 if SPLIT
    lse_ptr,  # [num_splits, N, Hq] float32, base 2; [Hq, N], base e, if PRIOR
    query_start_loc_ptr,  # [B+1]
    context_lens_ptr,  # [B]
    block_table_ptr,  # [B, max_blocks]
    bits_ptr,  # [B, T, W]
    depths_ptr,  # [B, T]
    k_scale_ptr,  # [1] float32
    v_scale_ptr,  # [1] float32
    qk_scale,  # softmax scale * log2(e)
    num_rows,  # N
    num_splits,
    stride_q_row,
    stride_q_head,
    stride_out_split: tl.int64,
    stride_out_row,
    stride_out_head,
    stride_block: tl.int64,
    stride_slot,
    stride_kv_head: tl.int64,
    stride_table: tl.int64,
    stride_bits_request: tl.int64,
    stride_bits_node,
    stride_depths: tl.int64,
    SPLIT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per K/V head
    PRIOR: tl.constexpr,  # out and lse hold the context's part already
    KV_SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,  # the interpreter cannot multiply bfloat16
):
    PRECISION: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    # Neighbours read the same K/V: the tiles of rows of one request and head.
    row_tile = tl.program_id(0)
    kv_head = tl.program_id(1) // num_splits
    split = tl.program_id(1) % num_splits
    request = tl.program_id(2).to(tl.int64)

    start = tl.load(query_start_loc_ptr + request)
    num_nodes = tl.load(query_start_loc_ptr + request + 1) - start
    if row_tile * BLOCK_M >= num_nodes * GROUP:
        return
    context = tl.load(context_lens_ptr + request)

    packed = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # a node's heads together
    node = packed // GROUP
    head = kv_head * GROUP + packed % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    exists = node < num_nodes
    mask = exists[:, None] & (offs_d[None, :] < HEAD_SIZE)

    # Ancestors precede their node: this tile needs no slot beyond its last row.
    last_node = ((row_tile + 1) * BLOCK_M - 1) // GROUP
    end = context + tl.minimum(num_nodes, last_node + 1)
    origin = context if PRIOR else 0
    first_slot = tl.maximum(context - WINDOW + 1, 0) if WINDOW else 0
    first_tile = first_slot // BLOCK_N
    num_tiles = tl.cdiv(end - origin, BLOCK_N)
    per_split = tl.cdiv(num_tiles - first_tile, num_splits)
    lo = first_tile + split * per_split
    hi = tl.minimum(lo + per_split, num_tiles)
    if SPLIT and lo >= hi:
        lse_ptr += (split.to(tl.int64) * num_rows + start) * NUM_HEADS
        lse_at = lse_ptr + node * NUM_HEADS + head
        tl.store(lse_at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=exists)
        return

    # Offsets from a request's first row fit 32 bits, and half the registers.
    q_ptr += start.to(tl.int64) * stride_q_row
    q_at = node * stride_q_row + head * stride_q_head
    q = tl.load(q_ptr + q_at[:, None] + offs_d, mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    v_scale = 1.0
    if KV_SCALES:
        qk_scale *= tl.load(k_scale_ptr)
        v_scale = tl.load(v_scale_ptr)
    # Of a score; soft-capped ones are in that unit already.
    to_log2 = 1.0 if SOFTCAP > 0 else qk_scale
    # Finite, so that a tile of which a row sees nothing leaves no NaN.
    m = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if PRIOR:
        prior_at = lse_ptr + start + head * num_rows + node
        prior = tl.load(prior_at, mask=exists, other=float("-inf")) * LOG2_E
        # FlashAttention 2 says +inf where it saw nothing, 3 says -inf.
        known = tl.abs(prior) < float("inf")
        m = tl.where(known, prior, m)
        total = tl.where(known, 1.0, 0.0)
        out_at = out_ptr + start.to(tl.int64) * stride_out_row
        out_at += (node * stride_out_row + head * stride_out_head)[:, None] + offs_d
        acc = tl.load(out_at, mask=mask & known[:, None], other=0.0).to(tl.float32)

    k_ptr += kv_head * stride_kv_head
    v_ptr += kv_head * stride_kv_head
    block_table_ptr += request * stride_table
    bits_ptr += request * stride_bits_request + node * stride_bits_node
    position = node
    if WINDOW:
        depths_ptr += request * stride_depths
        position = context + tl.load(depths_ptr + node, mask=exists, other=0)

    offs_n = tl.arange(0, BLOCK_N)
    full_tiles = (context - origin) // BLOCK_N
    # A tile's blocks are read one tile ahead: read in the same step, they would
    # hold up the loads of K and V by a trip to memory.
    slots = origin + lo * BLOCK_N + offs_n
    block = tl.load(block_table_ptr + slots // BLOCK_SIZE, mask=slots < end, other=0)

    for tile in range(lo, hi):
        slots = origin + tile * BLOCK_N + offs_n
        # Unsigned: signed division adds a tenth to the instructions of a tile.
        offset = block.to(tl.uint32).to(tl.int64) * stride_block
        offset += slots.to(tl.uint32) % BLOCK_SIZE * stride_slot
        offset = offset[:, None] + offs_d
        # No zero weight keeps a NaN in V out. Those may be past the tree, and
        # before every row's window, where blocks may be freed.
        live = (slots >= first_slot) & (slots < end)
        used = live[:, None] & (offs_d < HEAD_SIZE)
        k = tl.load(k_ptr + offset, mask=used, other=0.0)
        v = tl.load(v_ptr + offset, mask=used, other=0.0)
        ahead = slots + BLOCK_N
        ahead_at = block_table_ptr + ahead.to(tl.uint32) // BLOCK_SIZE
        block = tl.load(ahead_at, mask=ahead < end, other=0)

        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SOFTCAP > 0:
            # tanh by one exponential: it saturates, where two give inf / inf.
            y = tl.exp2(s * (qk_scale * (2 / SOFTCAP)))
            s = (SOFTCAP * LOG2_E) * (1 - 2 / (y + 1))
        if WINDOW > 0:
            column = slots - context
            of_tree = (column >= 0) & live
            depth = tl.load(depths_ptr + column, mask=of_tree, other=0)
            key = tl.where(of_tree, context + depth, slots)
            s = tl.where(position[:, None] - key[None, :] < WINDOW, s, float("-inf"))
        if tile >= full_tiles:  # reaches into the tree, from anywhere in a word
            first = origin + tile * BLOCK_N - context
            shift = first & 31
            word = _ancestor_word(bits_ptr, first >> 5, exists, end - context)
            seen = tl.zeros([BLOCK_M, BLOCK_N], tl.uint32)
            for w in tl.static_range(BLOCK_N // 32):
                at = (first >> 5) + w + 1
                after = _ancestor_word(bits_ptr, at, exists, end - context)
                bits = word >> shift | after << 1 << (31 - shift)
                seen = tl.where(offs_n // 32 == w, bits[:, None], seen)
                word = after
            seen = seen >> (offs_n % 32)[None, :] & 1
            s = tl.where(seen != 0, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc *= alpha[:, None]
        v = v.to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc, input_precision=PRECISION)
        m = m_new

    some = total > 0
    total = tl.where(some, total, 1.0)
    if SPLIT:
        lse = tl.where(some, m + tl.log2(total), float("-inf"))
        lse_ptr += (split.to(tl.int64) * num_rows + start) * NUM_HEADS
        tl.store(lse_ptr + node * NUM_HEADS + head, lse, mask=exists)
    acc *= (v_scale / total)[:, None]
    out_at = node * stride_out_row + head * stride_out_head
    out_ptr += split * stride_out_split + start.to(tl.int64) * stride_out_row
    out_at = out_ptr + out_at[:, None] + offs_d
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_requests", "num_splits"])
def merge_splits_kernel(
    partial_ptr,  # [num_splits, N, Hq, D] float32
    lse_ptr,  # [num_splits, N, Hq] float32, base 2; -inf where nothing was written
    out_ptr,  # [N, Hq, D]
    query_start_loc_ptr,  # [B+1]
    num_requests,  # B
    num_splits,
    stride_out_row,
    stride_out_head,
    BLOCK_S: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    if row >= tl.load(query_start_loc_ptr + num_requests):
        return
    num_rows = tl.num_programs(0)
    num_heads = tl.num_programs(1)
    split = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    at = (split.to(tl.int64) * num_rows + row) * num_heads + head
    lse = tl.load(lse_ptr + at, mask=split < num_splits, other=float("-inf"))
    written = lse > float("-inf")
    # Finite even where a row sees nothing, as in a dummy run.
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    total = tl.sum(weight, 0)
    partial = tl.load(
        partial_ptr + at[:, None] * HEAD_SIZE + offs_d[None, :],
        mask=written[:, None] & (offs_d[None, :] < HEAD_SIZE),
        other=0.0,
    )
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + row.to(tl.int64) * stride_out_row + head * stride_out_head + offs_d,
        out.to(out_ptr.dtype.element_ty),
        mask=offs_d < HEAD_SIZE,
    )
