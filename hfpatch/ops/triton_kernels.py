"""The Triton kernels: attention over lists of key blocks or over first and last tokens, and the merge of its parts.

Letters of the kernel: M rows of a tile, N keys of a tile. A row is a (query, head) pair: heads that share a choice of
keys are rows of one tile, so keys are read once for all of them. Every tile first meets the key tiles that all its
rows see whole (no mask), then the others (masked to the key).
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# What changes from prompt to prompt: one compiled kernel serves all its values. Strides of q, k, v and out stay out of
# this, since reads are wider where they are known to be aligned.
ATTEND_SIZES = [
    "out_s", "lse_s", "lse_b", "lse_h", "bias_b", "bias_h", "order_b", "order_h", "order_n", "full_b", "full_h",
    "full_n", "listed_b", "listed_h", "listed_n", "lq", "lk", "block_q", "tiles_per_block", "sink", "window",
]  # fmt: skip
MERGE_SIZES = ["lse_b", "lse_h", "lq", "rows"]
ORDER_SIZES = [
    "indices_b", "indices_h", "indices_n", "counts_b", "counts_h", "counts_n", "slots", "off", "lk", "block_q",
]  # fmt: skip


@triton.jit
def _dot(a, b, EXACT: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product in float32; UPCAST: in the interpreter, which would multiply the bits of bfloat16 numbers."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3" if EXACT else "tf32")


@triton.jit
def _logits(x, bias, tokens, inside, scale, softcap, CAPPED: tl.constexpr, BIASED: tl.constexpr):
    """Logits `[M, N]` in base 2 of the products x."""
    if CAPPED:
        x = x * (2 * scale / softcap)
        x = softcap * (1 - 2 / (tl.exp(x) + 1))
        x = x * LOG2E
    else:
        x = x * (scale * LOG2E)
    if BIASED:
        x += tl.load(bias + tokens[None, :], mask=inside, other=0.0).to(tl.float32) * LOG2E
    return x


@triton.jit
def _softmax_step(x, top, total, acc, GUARDED: tl.constexpr):
    """Online softmax: `(weights [M, N], new top, new total, rescaled acc)`; guarded: whole rows may be -inf."""
    new = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new == float("-inf"), 0.0, new) if GUARDED else new
    p = tl.exp2(x - safe[:, None])
    old = tl.exp2(top - safe)
    return p, new, total * old + tl.sum(p, 1), acc * old[:, None]


@triton.jit(do_not_specialize=ATTEND_SIZES)
def attend_kernel(
    q, k, v, out, lse, sinks, bias, order, full, listed, scale, softcap,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_s, out_b, out_n, out_h, lse_s, lse_b, lse_h, bias_b, bias_h,
    order_b, order_h, order_n, full_b, full_h, full_n, listed_b, listed_h, listed_n,
    lq, lk, units, kv_heads, block_q, tiles_per_block, sink, window,
    P: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, WD: tl.constexpr, WV: tl.constexpr, SPLITS: tl.constexpr,
    ORDERED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of M rows of one unit (P heads that choose together) over its keys, or over one split of them.

    BLOCK_K > 0: `order`, `full`, `listed` are a list of key blocks; 0: the first `sink` and the last `window` keys.
    ORDERED: the `full` blocks that all queries of the query block see whole stand first in the list.
    """
    split, b, u = tl.program_id(2), tl.program_id(1) // units, tl.program_id(1) % units
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block, part = pid // tiles_per_block, pid % tiles_per_block
    off, kv = lk - lq, u * kv_heads // units
    wide_b, wide_u, wide_block = b.to(tl.int64), u.to(tl.int64), block.to(tl.int64)

    row = part * M + tl.arange(0, M)
    query, head = block * block_q + row // P, u * P + row % P
    real = (row // P < block_q) & (query < lq)
    first = off + block * block_q + part * M // P
    last = tl.minimum(off + block * block_q + tl.minimum((part * M + M - 1) // P, block_q - 1), lk - 1)

    if BLOCK_K > 0:
        listed += wide_b * listed_b + wide_u * listed_h + wide_block * listed_n
        slots = tl.load(listed).to(tl.int32) * BLOCK_K
        full += wide_b * full_b + wide_u * full_h + wide_block * full_n
        plain = tl.load(full).to(tl.int32) * BLOCK_K // N if ORDERED else 0
        tiles = tl.cdiv(slots, N)
        at = order + wide_b * order_b + wide_u * order_h + wide_block * order_n
    else:
        slots, at = lk, order
        low = tl.maximum(first - window + 1, 0) // N
        inner = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), N), tl.cdiv(last + 1, N))
        plain = tl.maximum((first + 1) // N - inner, 0)
        sinking = tl.minimum(tl.cdiv(sink, N), low)
        left = inner - low
        tiles = plain + sinking + left + tl.cdiv(last + 1, N) - inner - plain
    each = tl.cdiv(tiles, SPLITS)
    start, stop = split * each, tl.minimum(split * each + each, tiles)

    d, dv, n = tl.arange(0, WD), tl.arange(0, WV), tl.arange(0, N)
    wide_head, wide_query = head.to(tl.int64), query.to(tl.int64)
    q += wide_b * q_b
    k += wide_b * k_b + kv.to(tl.int64) * k_h
    v += wide_b * v_b + kv.to(tl.int64) * v_h
    rows = tl.load(
        q + wide_head[:, None] * q_h + wide_query[:, None] * q_n + d[None, :],
        mask=real[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    bias_at = bias + wide_b * bias_b + wide_head[:, None] * bias_h
    acc = tl.zeros([M, WV], tl.float32)
    if SINKS:
        mine = real & (split == 0)
        top = tl.where(mine, tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32) * LOG2E, float("-inf"))
        total = tl.where(mine, 1.0, 0.0)
    else:
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)

    for t in range(start, tl.minimum(stop, plain)):
        if BLOCK_K == 0:
            tokens = (inner + t) * N + n
        elif BLOCK_K % N == 0:
            tokens = tl.load(at + t * N // BLOCK_K).to(tl.int32) * BLOCK_K + t * N % BLOCK_K + n
        else:
            tokens = tl.load(at + (t * N + n) // BLOCK_K).to(tl.int32) * BLOCK_K + (t * N + n) % BLOCK_K
        far = tokens.to(tl.int64)
        if D == WD:
            kt = tl.load(k + far[None, :] * k_n + d[:, None])
        else:
            kt = tl.load(k + far[None, :] * k_n + d[:, None], mask=(d < D)[:, None], other=0.0)
        x = _dot(rows, kt, EXACT, UPCAST)
        x = _logits(x, bias_at, tokens, real[:, None], scale, softcap, CAPPED, BIASED)
        p, top, total, acc = _softmax_step(x, top, total, acc, BIASED)
        if DV == WV:
            vt = tl.load(v + far[:, None] * v_n + dv[None, :])
        else:
            vt = tl.load(v + far[:, None] * v_n + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
        acc += _dot(p.to(vt.dtype), vt, EXACT, UPCAST)

    for t in range(tl.maximum(start, plain), stop):
        if BLOCK_K == 0:
            m = t - plain
            tile = tl.where(m < sinking, m, tl.where(m < sinking + left, low + m - sinking, low - sinking + m + plain))
            tokens = tile * N + n
            slot = tokens
        else:
            slot = t * N + n
            tokens = tl.load(at + slot // BLOCK_K, mask=slot < slots, other=0).to(tl.int32) * BLOCK_K + slot % BLOCK_K
        known = (slot < slots) & (tokens < lk)
        seen = known[None, :] & (tokens[None, :] <= off + query[:, None]) & real[:, None]
        if BLOCK_K == 0:
            seen = seen & ((tokens < sink)[None, :] | (off + query[:, None] - tokens[None, :] < window))
        far = tokens.to(tl.int64)
        kt = tl.load(k + far[None, :] * k_n + d[:, None], mask=known[None, :] & (d < D)[:, None], other=0.0)
        x = _logits(_dot(rows, kt, EXACT, UPCAST), bias_at, tokens, seen, scale, softcap, CAPPED, BIASED)
        p, top, total, acc = _softmax_step(tl.where(seen, x, float("-inf")), top, total, acc, True)
        vt = tl.load(v + far[:, None] * v_n + dv[None, :], mask=known[:, None] & (dv < DV)[None, :], other=0.0)
        acc += _dot(p.to(vt.dtype), vt, EXACT, UPCAST)

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(
        out + split.to(tl.int64) * out_s + wide_b * out_b + wide_query[:, None] * out_n + wide_head[:, None] * out_h
        + dv[None, :], acc.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :],
    )  # fmt: skip
    tl.store(
        lse + split.to(tl.int64) * lse_s + wide_b * lse_b + wide_head * lse_h + query,
        tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf")), mask=real,
    )  # fmt: skip


@triton.jit(do_not_specialize=MERGE_SIZES)
def merge_kernel(
    parts, part_lse, out, lse, out_b, out_n, out_h, lse_b, lse_h, lq, heads, rows,
    SPLITS: tl.constexpr, WS: tl.constexpr, DV: tl.constexpr, WV: tl.constexpr,
):  # fmt: skip
    """One query of one head: its splits `parts [S, B, Lq, Hq, Dv]`, `part_lse [S, B, Hq, Lq]` become one."""
    row = tl.program_id(0)
    b, head, query = row // (heads * lq), row // lq % heads, row % lq
    s, dv = tl.arange(0, WS), tl.arange(0, WV)
    each = tl.load(part_lse + s * rows + row, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(each, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp(each - safe)
    total = tl.sum(share, 0)
    some = total > 0
    at = ((b.to(tl.int64) * lq + query) * heads + head) * DV
    o = tl.load(
        parts + s.to(tl.int64)[:, None] * rows * DV + at + dv[None, :],
        mask=(s < SPLITS)[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    o = tl.sum(o * share[:, None], 0) / tl.where(some, total, 1.0)
    tl.store(
        out + b.to(tl.int64) * out_b + query.to(tl.int64) * out_n + head * out_h + dv,
        o.to(out.dtype.element_ty),
        mask=dv < DV,
    )
    tl.store(
        lse + b.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + query,
        tl.where(some, safe + tl.log(tl.where(some, total, 1.0)), float("-inf")),
    )  # fmt: skip


@triton.jit(do_not_specialize=ORDER_SIZES)
def order_kernel(
    indices, counts, order, full, listed, indices_b, indices_h, indices_n, counts_b, counts_h, counts_n,
    slots, off, lk, block_q, heads, BLOCK_K: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The list of one query block in order: key blocks that all its queries see whole, then those that some see.

    `order [B, H, nQ, slots]`, how many are `full` and how many `listed [B, H, nQ]`; W of a list at a time.
    """
    n, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    wide_b, wide_h, wide_n = b.to(tl.int64), h.to(tl.int64), n.to(tl.int64)
    indices += wide_b * indices_b + wide_h * indices_h + wide_n * indices_n
    count = tl.load(counts + wide_b * counts_b + wide_h * counts_h + wide_n * counts_n).to(tl.int32)
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + n
    first = off + n * block_q
    last = tl.minimum(first + block_q, lk) - 1
    s = tl.arange(0, W)
    some = 0
    for t in range(0, count, W):
        begin = tl.load(indices + t + s, mask=t + s < count, other=0).to(tl.int32) * BLOCK_K
        some += tl.sum(((t + s < count) & (begin + BLOCK_K <= first)).to(tl.int32), 0)
    before, total = 0, some
    for t in range(0, count, W):
        block = tl.load(indices + t + s, mask=t + s < count, other=0).to(tl.int32)
        whole = (t + s < count) & ((block + 1) * BLOCK_K <= first)
        cut = (t + s < count) & ((block + 1) * BLOCK_K > first) & (block * BLOCK_K <= last)
        a, z = tl.cumsum(whole.to(tl.int32), 0), tl.cumsum(cut.to(tl.int32), 0)
        at = tl.where(whole, before + a, total + z) - 1
        tl.store(order + row * slots + at, block, mask=whole | cut)
        before += tl.sum(whole.to(tl.int32), 0)
        total += tl.sum(cut.to(tl.int32), 0)
    tl.store(full + row, some)
    tl.store(listed + row, total)
