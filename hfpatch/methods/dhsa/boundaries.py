"""Where chunks begin: candidate scores, greedy non-maximum suppression and ragged boundary lists.

A boundary at p means that a chunk starts at token p. Regions are `[start, stop)` of the row's real tokens;
`start` is always a boundary, because what lies before it was cut earlier.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.blocks import longest

ROUNDS = 4
Suppress = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Cutting:
    """How candidates become boundaries; sizes in tokens.

    `radius`: boundaries closer than or at this distance to a better one are dropped. `mean`: at most one boundary
    per that many tokens. `longest`: longer chunks are split (0: never). `align`: boundaries are moved to multiples.
    """

    radius: int = 8
    mean: int = 16
    longest: int = 0
    align: int = 1


def window_sums(x: Tensor, w: int) -> Tensor:
    """Sums over w consecutive tokens: `x [..., L, D]` -> `[..., L - w + 1, D]`, in float32."""
    x = x.float()
    n = x.shape[-2] - w + 1
    total = x[..., :n, :].clone()
    for s in range(1, w):
        total += x[..., s : s + n, :]
    return total


def novelty(k: Tensor, w: int = 4) -> Tensor:
    """One minus the cosine of the mean keys left and right of each boundary, over all KV heads together.

    `k [B, Hkv, L, D]` -> `[B, L]` where entry p compares tokens p-w..p-1 with p..p+w-1; -inf without a full window.
    Same window and cosine as the paper's predictor sees, without training.
    """
    out = k.new_full((k.shape[0], k.shape[2]), -torch.inf, dtype=torch.float32)
    if k.shape[2] < 2 * w:
        return out
    dot: Tensor | float = 0.0
    norm: Tensor | float = 0.0
    for head in k.unbind(1):
        sums = window_sums(head, w)
        dot = dot + (sums[:, :-w] * sums[:, w:]).sum(-1)
        norm = norm + sums.square().sum(-1)
    norm = torch.as_tensor(norm)
    cosine = dot * (norm[:, :-w] * norm[:, w:]).clamp_min(1e-20).rsqrt()
    out[:, w : w + cosine.shape[1]] = 1 - cosine
    return out


def suppress(score: Tensor, radius: int) -> Tensor:
    """Greedy non-maximum suppression: bool `[B, L]` of the entries kept of `score [B, L]`; -inf is no candidate.

    Best first, an entry is dropped when a kept one lies within `radius`. Equal scores: one of the two is taken
    first by a fixed shuffle of positions. All entries that are best in their neighbourhood are settled at once,
    which is the greedy result in few rounds.
    """
    length = score.shape[1]
    alive = score > -torch.inf
    order = _shuffled(length, score.device)
    ranked = order[torch.where(alive, score, -torch.inf)[:, order].argsort(dim=1, stable=True)]
    rank = torch.empty_like(score).scatter_(
        1, ranked, torch.arange(length, device=score.device).expand_as(score) + 1.0
    )
    kept, radius = torch.zeros_like(alive), min(radius, length)
    while True:
        for _ in range(ROUNDS):
            now = torch.where(alive, rank, 0.0)
            best = _spread(now, radius)
            chosen = alive & (best == now)
            kept |= chosen
            alive &= _spread(chosen.to(rank.dtype), radius) == 0
        if not bool(alive.any()):
            return kept


def _spread(x: Tensor, radius: int) -> Tensor:
    return F.max_pool1d(x[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def _shuffled(length: int, device: torch.device) -> Tensor:
    """A fixed permutation: equal scores side by side would otherwise settle one per round."""
    position = torch.arange(length, device=device)
    return ((position * 2654435761) & 0xFFFFFFFF).argsort()


def cut(score: Tensor, how: Cutting, forced: int | None = None, suppress: Suppress = suppress) -> Tensor:
    """Bool `[B, n]`: where chunks of a region begin, given `score [B, n]` of its tokens (-inf: no candidate).

    `forced` is a boundary that enters first; candidates after it are skipped, so what follows is one chunk.
    """
    n = score.shape[1]
    score = score.clone()
    if forced is not None and 0 < forced < n:
        score[:, forced] = torch.inf
        score[:, forced + 1 :] = -torch.inf
    flags = suppress(score, how.radius)
    cap = max(1, n // how.mean)
    if cap < n:
        ranked = torch.where(flags, score, -torch.inf)
        top = torch.zeros_like(flags).scatter_(1, ranked.topk(cap, dim=1).indices, True)
        flags &= top
    flags[:, 0] = True
    return flags


def split_long(flags: Tensor, longest: int) -> Tensor:
    """Add boundaries to `flags [B, n]` so that no chunk exceeds `longest` tokens."""
    position = torch.arange(flags.shape[1], device=flags.device).expand_as(flags)
    since = position - torch.where(flags, position, 0).cummax(1).values
    return flags | (since % longest == 0)


def snap(flags: Tensor, start: int, align: int) -> Tensor:
    """Move the boundaries of `flags [B, n]`, a region beginning at token `start`, to multiples of `align`."""
    n = flags.shape[1]
    position = torch.arange(start, start + n, device=flags.device)
    target = ((position + align // 2) // align * align - start).clamp(0, n).expand_as(flags)
    moved = flags.new_zeros(flags.shape[0], n + 1).scatter_(1, torch.where(flags, target, n), True)[:, :n]
    moved[:, 0] = True
    return moved


def fixed(batch: int, start: int, stop: int, size: int, device: torch.device) -> Tensor:
    """Bool `[B, stop - start]`: chunks begin at every multiple of `size`, counted from token 0."""
    flags = torch.arange(start, stop, device=device) % size == 0
    flags[:1] = True
    return flags.expand(batch, -1)


def to_list(flags: Tensor, start: int, most: int | None = None) -> Tensor:
    """Boundary positions `[B, C]` of `flags [B, n]`, padded with the region's end `start + n`.

    C is the largest number of them in a row; on a GPU, which reading it would wait for, the `most` there can be.
    """
    b, n = flags.shape
    count = longest(flags.sum(1), n if most is None else min(most, n))
    place = torch.arange(start, start + n, device=flags.device).expand(b, n)
    slot = torch.where(flags, flags.cumsum(1) - 1, count)
    return place.new_full((b, count + 1), start + n).scatter_(1, slot, place)[:, :count]


def brute_force(score: list[float], radius: int) -> list[int]:
    """The definition of `suppress` for one row of different scores, as plain loops."""
    kept: list[int] = []
    for i in sorted(range(len(score)), key=lambda n: -score[n]):
        if score[i] > float("-inf") and all(abs(i - j) > radius for j in kept):
            kept.append(i)
    return sorted(kept)
