"""The Triton kernel that drops what lies too close to something better."""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _shuffled(at):
    """Numbers that no two positions share, in no order: of equal scores the larger one's is the better."""
    return at.to(tl.uint32) * 2654435761


@triton.jit(do_not_specialize=["score_b", "length", "radius"])
def suppress_kernel(score, alive, kept, score_b, length, radius, N: tl.constexpr):
    """Greedy non-maximum suppression of one row: `kept [B, L]` of `score [B, L]`, with `alive [B, L]` to work in.

    Rounds until all are settled: what is best within `radius` is kept, then what lies within `radius` of it drops out.
    Every round reads what other threads of the program wrote before the barrier.
    """
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    score += row * score_b
    alive += row * length
    kept += row * length
    left = 0
    for t in range(0, length, N):
        at = t + n
        candidate = (tl.load(score + at, mask=at < length, other=float("-inf")) > float("-inf")).to(tl.int32)
        tl.store(alive + at, candidate.to(tl.int8), mask=at < length)
        tl.store(kept + at, tl.zeros([N], tl.int8), mask=at < length)
        left += tl.sum(candidate, 0)
    tl.debug_barrier()
    while left > 0:
        for t in range(0, length, N):
            at = t + n
            mine = tl.load(score + at, mask=at < length, other=float("-inf"))
            open = tl.load(alive + at, mask=at < length, other=0).to(tl.int32)
            for s in range(-radius, radius + 1):
                there = (at + s >= 0) & (at + s < length) & (open > 0)
                other = tl.load(score + at + s, mask=there, other=float("-inf"))
                rival = there & (tl.load(alive + at + s, mask=there, other=0) > 0)
                better = (other > mine) | ((other == mine) & (_shuffled(at + s) > _shuffled(at)))
                open = tl.where(rival & better, 0, open)
            tl.store(kept + at, tl.full([N], 1, tl.int8), mask=(at < length) & (open > 0))
        tl.debug_barrier()
        left = 0
        for t in range(0, length, N):
            at = t + n
            open = tl.load(alive + at, mask=at < length, other=0).to(tl.int32)
            for s in range(-radius, radius + 1):
                there = (at + s >= 0) & (at + s < length) & (open > 0)
                open = tl.where(tl.load(kept + at + s, mask=there, other=0) > 0, 0, open)
            tl.store(alive + at, open.to(tl.int8), mask=at < length)
            left += tl.sum(open, 0)
        tl.debug_barrier()
