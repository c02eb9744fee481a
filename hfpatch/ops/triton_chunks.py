"""Triton kernels that choose chunks of keys: attention per chunk, a threshold over scores, lists of tokens.

Chunks cover a row's tokens in order: `count` closed ones that begin at `starts [B, count]` (those that are empty begin
where the next does), then an open one of tokens `closed .. seen`. Letters: M rows (heads), N keys, C chunks of a tile.
A unit is `align` tokens.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from hfpatch.ops.triton_kernels import LN2, _dot, _logits

OPEN_SIZES = ["k_b", "k_h", "k_n", "moments_b", "moments_h", "added", "closed", "seen", "last"]
ATTENTION_SIZES = [
    "k_b", "k_h", "k_n", "q_b", "q_h", "bias_b", "bias_h", "starts_b", "count", "closed", "seen",
]  # fmt: skip
MOMENT_SIZES = [
    "moments_b", "moments_h", "q_b", "q_h", "starts_b", "count", "closed", "seen", "upto",
]  # fmt: skip
CHOICE_SIZES = [
    "parts", "score_b", "score_h", "score_n", "starts_b", "count", "closed", "seen", "first", "stop", "block", "local",
    "sink", "budget", "align",
]  # fmt: skip


@triton.jit
def _log(x):
    """Natural logarithm; -inf of 0."""
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), float("-inf"))


@triton.jit
def _edges(starts, c, count, closed, seen):
    """Where the chunks c begin: the closed ones as listed, the open one at token `closed`, none after."""
    listed = tl.load(starts + c, mask=c < count, other=0).to(tl.int32)
    return tl.where(c < count, listed, tl.where(c == count, closed, seen))


@triton.jit
def _room(n, first, stop, block, local, sink, align):
    """Units `[low, high)` that query block n sees whatever they score, its own among them."""
    at = first + n * block
    low = tl.maximum(tl.maximum(at - local, 0) // align, sink)
    return low, (tl.minimum(at + block, stop) + align - 1) // align


@triton.jit
def _planes(p, START: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Channels of the rotary planes p, and which have two; those outside `START .. START + 2 HALF` stand alone."""
    paired = (p >= START) & (p < START + HALF)
    turned = START + 2 * (p - START) if INTERLEAVED else p
    one = tl.where(paired, turned, tl.where(p < START, p, p + HALF))
    return one, one + (1 if INTERLEAVED else HALF), paired


@triton.jit(do_not_specialize=OPEN_SIZES)
def open_kernel(
    k, sums, moments, k_b, k_h, k_n, moments_b, moments_h, added, closed, seen, last, most, kv_heads,
    D: tl.constexpr, START: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WP: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Add the keys `added .. seen` to the open chunk's `sums [B, Hkv, 2 D]`; its means and variances to row `last`."""
    b, h = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    p, n = tl.arange(0, WP), tl.arange(0, N)
    one, two, paired = _planes(p, START, HALF, INTERLEAVED)
    real = p < D - HALF
    paired = paired & real
    k += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
    sums += tl.program_id(0).to(tl.int64) * 2 * D
    moments += b.to(tl.int64) * moments_b + h.to(tl.int64) * moments_h + last.to(tl.int64) * (2 * D - HALF)
    total_one, square_one = tl.load(sums + one, mask=real, other=0.0), tl.load(sums + D + one, mask=real, other=0.0)
    total_two, square_two = (
        tl.load(sums + two, mask=paired, other=0.0),
        tl.load(sums + D + two, mask=paired, other=0.0),
    )
    for t in range(added, seen, N):
        inside = (t + n < seen)[:, None]
        at = k + (t + n).to(tl.int64)[:, None] * k_n
        x = tl.load(at + one[None, :], mask=inside & real[None, :], other=0.0).to(tl.float32)
        y = tl.load(at + two[None, :], mask=inside & paired[None, :], other=0.0).to(tl.float32)
        total_one += tl.sum(x, 0)
        square_one += tl.sum(x * x, 0)
        total_two += tl.sum(y, 0)
        square_two += tl.sum(y * y, 0)
    tl.store(sums + one, total_one, mask=real)
    tl.store(sums + D + one, square_one, mask=real)
    tl.store(sums + two, total_two, mask=paired)
    tl.store(sums + D + two, square_two, mask=paired)
    length = (seen - closed).to(tl.float32)
    mean_one, mean_two = total_one / length, total_two / length
    spread = tl.maximum(square_one / length - mean_one * mean_one, 0.0)
    spread += tl.where(paired, tl.maximum(square_two / length - mean_two * mean_two, 0.0), 0.0)
    spread = spread / tl.where(paired, 2.0, 1.0)
    kind = moments.dtype.element_ty
    tl.store(moments + one, tl.minimum(mean_one, most).to(kind), mask=real)
    tl.store(moments + two, tl.minimum(mean_two, most).to(kind), mask=paired)
    tl.store(moments + D + p, tl.minimum(spread, most).to(kind), mask=real)


@triton.jit(do_not_specialize=ATTENTION_SIZES)
def chunk_attention_kernel(
    q, k, bias, starts, density, part_lse, scale, softcap,
    k_b, k_h, k_n, q_b, q_h, bias_b, bias_h, starts_b, count, closed, seen, kv_heads,
    G: tl.constexpr, D: tl.constexpr, WD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One query's attention to C chunks by the G heads of a group: logarithms of the weight per token of a chunk.

    `density [B, Hq, count + 1]` lacks the normaliser, which `part_lse [B, Hq, tiles]` add up to.
    """
    tile, b, h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    heads = kv_heads * G
    wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
    c, n, d, g = tile * C + tl.arange(0, C), tl.arange(0, N), tl.arange(0, WD), tl.arange(0, M)
    starts += wide_b * starts_b
    begin, end = _edges(starts, c, count, closed, seen), _edges(starts, c + 1, count, closed, seen)
    head = (h * G + g).to(tl.int64)
    mine = g < G
    rows = tl.load(
        q + wide_b * q_b + head[:, None] * q_h + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0
    )
    bias_at = bias + wide_b * bias_b + head[:, None] * bias_h
    k += wide_b * k_b + wide_h * k_h
    mass = tl.zeros([M, C], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    stop = tl.max(end, 0)
    for t in range(tl.min(begin, 0), stop, N):
        tokens = t + n
        known = tokens < stop
        kt = tl.load(
            k + tokens.to(tl.int64)[None, :] * k_n + d[:, None], mask=known[None, :] & (d < D)[:, None], other=0.0
        )
        x = _dot(rows, kt, EXACT, UPCAST)
        x = _logits(x, bias_at, tokens, known[None, :] & mine[:, None], scale, softcap, CAPPED, BIASED)
        x = tl.where(known[None, :], x, float("-inf"))
        new = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(x - safe[:, None])
        inside = (tokens[:, None] >= begin[None, :]) & (tokens[:, None] < end[None, :])
        mass = mass * tl.exp2(top - safe)[:, None] + tl.dot(weights, inside.to(tl.float32), input_precision="tf32x3")
        top = new
    safe = tl.where(top == float("-inf"), 0.0, top)
    length = tl.maximum(end - begin, 1).to(tl.float32)
    found = _log(mass) + (safe * LN2)[:, None] - tl.log(length)[None, :]
    out = density + (wide_b * heads + head)[:, None] * (count + 1) + c[None, :]
    tl.store(out, found, mask=mine[:, None] & (c < count + 1)[None, :])
    lse = _log(tl.sum(mass, 1)) + safe * LN2
    tl.store(part_lse + (wide_b * heads + head) * tl.num_programs(0) + tile, lse, mask=mine)


@triton.jit(do_not_specialize=MOMENT_SIZES)
def chunk_moments_kernel(
    q, moments, starts, density, part_lse, scale,
    moments_b, moments_h, q_b, q_h, starts_b, count, closed, seen, upto, kv_heads,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    START: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """One query and the `moments [B, Hkv, count + 1, 2 D - HALF]` of C chunks, S channels at a time.

    POOLED = 0: as `chunk_attention_kernel`, logits within a chunk taken as normal, chunks up to token `upto` in the
    normaliser. Else the mean of so many query heads times sqrt(length) * mean(k), to `density [B, Hkv, count + 1]`.
    """
    tile, b, h = tl.program_id(0), tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    heads = kv_heads * G
    wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
    c = tile * C + tl.arange(0, C)
    starts += wide_b * starts_b
    begin, end = _edges(starts, c, count, closed, seen), _edges(starts, c + 1, count, closed, seen)
    length, there = (end - begin).to(tl.float32), c < count + 1
    q += wide_b * q_b
    at = moments + wide_b * moments_b + wide_h * moments_h + c.to(tl.int64)[None, :] * (2 * D - HALF)
    if POOLED > 0:
        first = (h * G).to(tl.int64) if POOLED == G else wide_h * 0
        score = tl.zeros([C], tl.float32)
        for s in range(0, D, S):
            d = s + tl.arange(0, S)
            pooled = tl.zeros([S], tl.float32)
            for n in range(POOLED):
                pooled += tl.load(q + (first + n) * q_h + d, mask=d < D, other=0.0).to(tl.float32)
            means = tl.load(at + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
            score += tl.sum((pooled / POOLED)[:, None] * means, 0)
        tl.store(density + tl.program_id(1).to(tl.int64) * (count + 1) + c, score * tl.sqrt(length), mask=there)
    else:
        g = tl.arange(0, M)
        mine, head = g < G, (h * G + g).to(tl.int64)
        q += head[:, None] * q_h
        logits = tl.zeros([M, C], tl.float32)
        for s in range(0, D, S):
            d = s + tl.arange(0, S)
            rows = tl.load(q + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            means = tl.load(at + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
            logits += tl.dot(rows * scale, means, input_precision="tf32x3")
        for s in range(0, D - HALF, S):
            p = s + tl.arange(0, S)
            one, two, paired = _planes(p, START, HALF, INTERLEAVED)
            real = p < D - HALF
            x = tl.load(q + one[None, :], mask=mine[:, None] & real[None, :], other=0.0).to(tl.float32)
            y = tl.load(q + two[None, :], mask=mine[:, None] & (real & paired)[None, :], other=0.0).to(tl.float32)
            spreads = tl.load(at + D + p[:, None], mask=there[None, :] & real[:, None], other=0.0).to(tl.float32)
            logits += tl.dot((x * x + y * y) * (0.5 * scale * scale), spreads, input_precision="tf32x3")
        out = density + (wide_b * heads + head)[:, None] * (count + 1) + c[None, :]
        tl.store(out, logits, mask=mine[:, None] & there[None, :])
        past = there & (end <= upto) & (length > 0)
        weighted = tl.where(past[None, :], logits + tl.log(tl.maximum(length, 1.0))[None, :], float("-inf"))
        top = tl.max(weighted, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        lse = safe + _log(tl.sum(tl.exp(weighted - safe[:, None]), 1))
        tl.store(part_lse + (wide_b * heads + head) * tl.num_programs(0) + tile, lse, mask=mine)


@triton.jit
def _added(a, b):
    """`log(exp(a) + exp(b))`."""
    top = tl.maximum(a, b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return safe + _log(tl.exp(a - safe) + tl.exp(b - safe))


@triton.jit(do_not_specialize=CHOICE_SIZES)
def choose_kernel(
    score, part_lse, starts, upto, parts, score_b, score_h, score_n, starts_b, count, closed, seen,
    first, stop, block, local, sink, budget, align, heads,
    MEMBERS: tl.constexpr, SUMMED: tl.constexpr, W: tl.constexpr, WT: tl.constexpr,
):  # fmt: skip
    """How many units of the chunks up to each are kept for one query block of one head: `upto [B, H, nQ, count + 1]`.

    Best first until the block's room is full; the last one is cut, of equal ones the earlier is better. What MEMBERS
    heads say of a chunk, `score [B, H MEMBERS, nQ, count + 1]`, is added up plainly if SUMMED, else in logarithms
    less their normalisers.
    """
    n, b, h = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    c = tl.arange(0, W)
    there = c < count + 1
    wide_b = b.to(tl.int64)
    starts += wide_b * starts_b
    score += wide_b * score_b + n.to(tl.int64) * score_n + c
    best = tl.full([W], 0.0 if SUMMED else float("-inf"), tl.float32)
    for m in range(MEMBERS):
        head = (h * MEMBERS + m).to(tl.int64)
        x = tl.load(score + head * score_h, mask=there, other=0.0)
        if SUMMED:
            best += x
        else:
            t = tl.arange(0, WT)
            each = tl.load(
                part_lse + (wide_b * heads * MEMBERS + head) * parts + t, mask=t < parts, other=float("-inf")
            )
            top = tl.max(each, 0)
            safe = tl.where(top == float("-inf"), 0.0, top)
            lse = safe + _log(tl.sum(tl.exp(each - safe), 0))
            best = _added(best, x - tl.where(lse == float("-inf"), 0.0, lse))
    begin, end = _edges(starts, c, count, closed, seen), _edges(starts, c + 1, count, closed, seen)
    low, high = _room(n, first, stop, block, local, sink, align)
    need = budget - high + low - sink
    length = tl.maximum(tl.minimum(end // align, low) - tl.maximum(begin // align, sink), 0)
    bits = (best + 0.0).to(tl.uint32, bitcast=True)  # as whole numbers in the order of the scores
    negative = (bits >> 31) == 1
    key = bits ^ tl.where(negative, 0xFFFFFFFF, 0x80000000)
    least = (need * 0).to(tl.uint32)
    bit = least + 0x80000000
    for _ in range(32):  # the largest threshold that still fills the room
        higher = least | bit
        enough = tl.sum(tl.where(key >= higher, length, 0), 0) >= need
        least = tl.where(enough, higher, least)
        bit = bit >> 1
    above = tl.where(key > least, length, 0)
    left = tl.maximum(need - tl.sum(above, 0), 0)
    kept = tl.cumsum(above, 0) + tl.minimum(tl.cumsum(tl.where(key == least, length, 0), 0), left)
    upto += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + n) * (count + 1)
    tl.store(upto + c, kept, mask=there)


@triton.jit(do_not_specialize=CHOICE_SIZES)
def list_kernel(
    upto, starts, lists, starts_b, count, closed, seen, first, stop, block, local, sink, budget, align, heads,
    STEPS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """N slots of `lists [B, H, nQ, budget]`: sink, kept units of chunks in order, recent units."""
    n, b = tl.program_id(0), tl.program_id(2) // heads
    slot = tl.program_id(1) * N + tl.arange(0, N)
    low, high = _room(n, first, stop, block, local, sink, align)
    recent = budget - high + low
    nth = slot - sink
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + n
    upto += row * (count + 1)
    a = slot * 0
    z = a + count
    for _ in range(STEPS):  # the first chunk with more than nth units up to it
        middle = (a + z) // 2
        more = tl.load(upto + middle) > nth
        z = tl.where(more, middle, z)
        a = tl.where(more, a, tl.minimum(middle + 1, count))
    before = tl.load(upto + a - 1, mask=a > 0, other=0)
    begin = _edges(starts + b.to(tl.int64) * starts_b, a, count, closed, seen)
    unit = tl.maximum(begin // align, sink) + nth - before
    unit = tl.where(slot < sink, slot, tl.where(slot < recent, unit, low + slot - recent))
    tl.store(lists + row * budget + slot, unit, mask=slot < budget)
