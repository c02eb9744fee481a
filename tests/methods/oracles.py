"""Plain-loop implementations of the papers' selections."""

import math
from typing import Any

import torch
from torch import Tensor

from hfpatch.core.call import AttentionCall


def heads_of(call: AttentionCall, head_sharing: str) -> list[list[int]]:
    """Query heads that choose together."""
    n = {"group": call.Hkv, "head": call.Hq, "all": 1}[head_sharing]
    return [list(range(c * call.Hq // n, (c + 1) * call.Hq // n)) for c in range(n)]


def tiles_of(call: AttentionCall, block_q: int) -> list[list[int]]:
    """Query numbers of each tile."""
    return [list(range(a, min(a + block_q, call.Lq))) for a in range(0, call.Lq, block_q)]


def blocks_of(call: AttentionCall, block_k: int) -> list[list[int]]:
    """Key numbers of each block."""
    return [list(range(a, min(a + block_k, call.Lk))) for a in range(0, call.Lk, block_k)]


def mask_of(call: AttentionCall, choose: Any, head_sharing: str, block_q: int, block_k: int) -> Tensor:
    """Mask `[B, Hq, Lq, Lk]` from `choose(b, heads, tile, blocks) -> block numbers`, causality applied."""
    keep = torch.zeros(call.B, call.Hq, call.Lq, call.Lk, dtype=torch.bool)
    blocks = blocks_of(call, block_k)
    for b in range(call.B):
        for heads in heads_of(call, head_sharing):
            for tile in tiles_of(call, block_q):
                for m in choose(b, heads, tile, blocks):
                    keep[b, heads, tile[0] : tile[-1] + 1, blocks[m][0] : blocks[m][-1] + 1] = True
    return keep & causal(call)


def causal(call: AttentionCall) -> Tensor:
    """Bool `[Lq, Lk]`."""
    return torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)


def best(score: dict[int, float], count: int) -> set[int]:
    """The `count` keys with the highest values."""
    return set(sorted(score, key=lambda m: -score[m])[: max(count, 0)])


def own(call: AttentionCall, tile: list[int], blocks: list[list[int]]) -> set[int]:
    """Blocks with keys of a tile's own tokens."""
    return {m for m, keys in enumerate(blocks) if any(call.off + i in keys for i in tile)}


def room(call: AttentionCall, tile: list[int], blocks: list[list[int]], budget: int | float, floor: int = 0) -> int:
    """How many whole blocks before its own ones a tile may have."""
    start = blocks[min(own(call, tile, blocks))][0]
    seen = [call.off + i + 1 for i in tile]
    mine, size = [n - start for n in seen], len(blocks[0])
    if isinstance(budget, int):
        return max(0, (budget - max(mine)) // size)
    count = max(0, round((budget * sum(seen) - sum(mine)) / (len(tile) * size)))
    while count * size < start and any(m + count * size < min(floor, n) for m, n in zip(mine, seen, strict=True)):
        count += 1
    return count


def forced(
    call: AttentionCall, tile: list[int], blocks: list[list[int]], sink: int, window: int, most: int | None = None
) -> set[int]:
    """Blocks of a tile that are always kept; of `most` whole ones half: the first, then the most recent."""
    mine = own(call, tile, blocks)
    newest = next(m for m, keys in enumerate(blocks) if call.off + tile[-1] in keys)
    past = [m for m, keys in enumerate(blocks) if keys[0] <= call.off + tile[-1] and m not in mine]
    ranked = [m for m in past if m < sink] + [m for m in reversed(past) if m >= sink and newest - m < window]
    return mine | set(ranked if most is None else ranked[: math.ceil(most / 2)])


def kv(call: AttentionCall, head: int) -> int:
    """The key head of a query head."""
    return head // call.groups


def block_topk(
    call: AttentionCall, budget: int | float, block_q: int, block_k: int, sink_blocks: int, window_blocks: int,
    head_sharing: str, floor: int = 0,
) -> Tensor:  # fmt: skip
    """Softmax of mean query times mean keys over whole past blocks, averaged over the heads that share."""

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        most = room(call, tile, blocks, budget, floor)
        always = forced(call, tile, blocks, sink_blocks, window_blocks, most)
        whole = [m for m, keys in enumerate(blocks) if len(keys) == block_k and keys[-1] <= call.off + tile[0]]
        score = dict.fromkeys(whole, 0.0)
        for h in heads:
            q = call.q[b, h, tile].mean(0)
            means = {m: call.k[b, kv(call, h), blocks[m]].mean(0) for m in whole}
            e = {m: math.exp(call.scale * float(q @ means[m])) for m in whole}
            for m in whole:
                score[m] += e[m] / sum(e.values())
        rest = {m: x for m, x in score.items() if m not in always}
        return always | best(rest, most + len(own(call, tile, blocks)) - len(always))

    return mask_of(call, choose, head_sharing, block_q, block_k)


def tile_energies(call: AttentionCall, b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> dict:
    """FlashPrefill's S[J] of one tile: rows see a mean key only when its whole block is past."""
    x: dict[int, list[float]] = {}
    size = len(blocks[0])
    for m, keys in enumerate(blocks):
        for h in heads:
            mean = call.k[b, kv(call, h), keys].mean(0)
            rows = [i for i in tile if len(keys) == size and keys[-1] <= call.off + i]
            if rows:
                x.setdefault(m, []).extend((call.scale * call.q[b, h, rows] @ mean).tolist())
    top = max((max(v) for v in x.values()), default=0.0)
    return {m: sum(math.exp(a - top) for a in v) for m, v in x.items()}


def flash_prefill(
    call: AttentionCall,
    alpha: float,
    block_q: int,
    block_k: int,
    sink_blocks: int,
    window_blocks: int,
    last_blocks: int,
    head_sharing: str,
    budget: int | float | None = None,
    floor: int = 0,
) -> Tensor:
    """Blocks with S[J] >= alpha max S, sink, window; the last tiles dense; at most `budget` of the keys."""
    tiles = tiles_of(call, block_q)
    dense = {i for tile in tiles[len(tiles) - last_blocks :] for i in tile} if last_blocks else set()

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        if tile[0] in dense:
            return set(range(len(blocks)))
        most = None if budget is None else room(call, tile, blocks, budget, floor)
        always = forced(call, tile, blocks, sink_blocks, window_blocks, most)
        energy = tile_energies(call, b, heads, tile, blocks)
        keep = {m: s for m, s in energy.items() if s >= alpha * max(energy.values())}
        if most is None:
            return always | set(keep)
        rest = {m: s for m, s in keep.items() if m not in always}
        return always | best(rest, most + len(own(call, tile, blocks)) - len(always))

    return mask_of(call, choose, head_sharing, block_q, block_k)


def quest(call: AttentionCall, budget: int, page: int, head_sharing: str) -> Tensor:
    """Pages with the highest bound sum_d max(q_d min_d, q_d max_d), the last page among them, at least three."""

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        score = {}
        for m, keys in enumerate(blocks[:-1]):
            score[m] = 0.0
            for h in heads:
                low, high = (x.tolist() for x in call.k[b, kv(call, h), keys].aminmax(dim=0))
                q = call.q[b, h, 0].tolist()
                score[m] += sum(max(x * a, x * z) for x, a, z in zip(q, low, high, strict=True))
        return {len(blocks) - 1} | best(score, max(3, math.ceil(budget / page)) - 1)

    return mask_of(call, choose, head_sharing, 1, page)


def pattern(call: AttentionCall, block: int, heads: int, rule: Any) -> Tensor:
    """Token mask of a block rule `rule(h, I, J)`."""
    keep = torch.zeros(call.B, call.Hq, call.Lq, call.Lk, dtype=torch.bool)
    for h in range(call.Hq):
        for n in range(call.Lq):
            i = (call.off + n) // block
            row = [rule(h * heads // call.Hq, i, j // block) for j in range(call.Lk)]
            keep[:, h, n] = torch.tensor(row)
    return keep & causal(call)


def vertical_slash(
    call: AttentionCall,
    budgets: list[tuple[int, int]],
    estimate: int,
    sink: int,
    local: int,
    block_q: int,
    block_k: int,
    head_sharing: str,
) -> Tensor:
    """Bands of block_k columns and diagonals by the last queries' attention; every block a kept line crosses."""
    n = -(-call.Lk // block_k)
    lines: dict[tuple[int, int], tuple[set[int], set[int]]] = {}
    for b in range(call.B):
        for c, heads in enumerate(heads_of(call, head_sharing)):
            vertical, slash = dict.fromkeys(range(n), 0.0), dict.fromkeys(range(n), 0.0)
            for h in heads:
                for i in range(max(0, call.Lq - estimate), call.Lq):
                    at = call.off + i
                    p = (call.scale * call.k[b, kv(call, h), : at + 1] @ call.q[b, h, i]).softmax(0).tolist()
                    for j, w in enumerate(p):
                        vertical[j // block_k] += w
                        slash[(at - j) // block_k] += w
            kept = []
            for score, budget, first in ((vertical, budgets[c][0], sink), (slash, budgets[c][1], local)):
                always = set(range(math.ceil(first / block_k)))
                rest = {m: x for m, x in score.items() if m not in always}
                kept.append(always | best(rest, math.ceil(budget / block_k) - len(always)))
            lines[b, heads[0]] = (kept[0], kept[1])

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        vertical, slash = lines[b, heads[0]]
        out = set(vertical)
        for m, keys in enumerate(blocks):
            offsets = {(call.off + i - j) // block_k for i in tile for j in keys if j <= call.off + i}
            if offsets & slash:
                out.add(m)
        return {m for m in out if m < len(blocks)}

    return mask_of(call, choose, head_sharing, block_q, block_k)


def xattention(
    call: AttentionCall, top_p: float, stride: int, block_q: int, block_k: int, sink_blocks: int, window_blocks: int,
    head_sharing: str,
) -> Tensor:  # fmt: skip
    """Cells score with the sum of their antidiagonal over stride; softmax over cells; smallest set with `top_p`."""

    def cells(b: int, h: int, tile: list[int]) -> Any:
        for a in range(tile[0], tile[-1] + 1, stride):
            rows = [i for i in range(a, a + stride) if i < call.Lq]
            logits = []
            for c in range(0, call.off + rows[-1] + 1, stride):
                total = 0.0
                for r in range(stride):
                    i, j = a + stride - 1 - r, c + r
                    if i < call.Lq and j < call.Lk:
                        total += float(call.q[b, h, i] @ call.k[b, kv(call, h), j])
                logits.append(call.scale * total / stride)
            yield torch.tensor(logits).softmax(0).tolist()

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        score = dict.fromkeys(range(len(blocks)), 0.0)
        for h in heads:
            for row in cells(b, h, tile):
                for c, w in enumerate(row):
                    score[c * stride // block_k] += w
        out, total = set(), 0.0
        for m in sorted(score, key=lambda m: -score[m]):
            if total < top_p * sum(score.values()):
                out.add(m)
            total += score[m]
        return out | forced(call, tile, blocks, sink_blocks, window_blocks)

    return mask_of(call, choose, head_sharing, block_q, block_k)


def skip_softmax(call: AttentionCall, threshold: float, block_q: int, block_k: int, head_sharing: str) -> Tensor:
    """A tile stays when some row has its maximum above the running maximum plus ln lambda."""

    def choose(b: int, heads: list[int], tile: list[int], blocks: list[list[int]]) -> set[int]:
        out = set()
        for h in heads:
            for i in tile:
                running = -math.inf
                for m, keys in enumerate(blocks):
                    seen = [j for j in keys if j <= call.off + i]
                    if not seen:
                        break
                    logits = call.scale * call.k[b, kv(call, h), seen] @ call.q[b, h, i]
                    if call.softcap is not None:
                        logits = call.softcap * torch.tanh(logits / call.softcap)
                    top = float(logits.max())
                    running = max(running, top)
                    if top - running > math.log(threshold):
                        out.add(m)
        return out

    return mask_of(call, choose, head_sharing, block_q, block_k)
