"""How much a query block wants a chunk: by some of its queries, or from means and variances of the chunk's keys."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.call import AttentionCall
from ...core.sampling import sampled_weights
from .rotary import Rotary

RULES = ("mass", "queries", "mean", "centered", "bands")


@dataclass(frozen=True)
class Chunks:
    """Chunks at `[starts, ends)`, each `[B, C]`: means and plane-wise variances, `statistics [B, Hkv, C, D + P]`."""

    statistics: Tensor
    starts: Tensor
    ends: Tensor
    rotary: Rotary

    @property
    def length(self) -> Tensor:
        """Tokens per chunk as float32, `[B, C]`; 0 for the padding of ragged rows."""
        return (self.ends - self.starts).float()

    def before(self, upto: Tensor) -> Tensor:
        """Which chunks lie wholly before `upto [nQ]`, `[B, 1, nQ, C]`: what a causal normaliser may look at."""
        return ((self.ends[:, None] <= upto[:, None]) & (self.length[:, None] > 0))[:, None]

    def represent(self, d: int, shared: bool) -> Tensor:
        """The paper's `sqrt(len) * mean(k)`, `[B, Hkv or 1, C, D]`: its noise does not depend on the length."""
        mean = self.statistics[..., :d].float() * self.length.sqrt()[:, None, :, None]
        return mean.mean(1, keepdim=True) if shared else mean


def score_chunks(q: Tensor, chunks: Chunks, rule: str, upto: Tensor, scale: float, shared: bool = False) -> Tensor:
    """Scores `[B, Hkv or 1, nQ, C]` of pooled queries `q [B, Hq, nQ, D]`; chunks are ranked by them.

    "mean" is the paper's; "centered" and "bands" correct it; "mass" estimates softmax mass per token. `shared` makes
    one selection for all heads. Rules other than "mean" compare a chunk with those wholly before `upto [nQ]`.
    """
    if rule == "mass":
        return _mass(q, chunks, upto, scale, shared)
    hkv = chunks.statistics.shape[1]
    pooled = q.unflatten(1, (1 if shared else hkv, -1)).mean(2)
    keys = chunks.represent(q.shape[-1], shared)
    if rule == "bands":
        return _bands(pooled, keys, chunks.before(upto))
    score = pooled @ keys.mT
    return _centre(score, chunks, upto) if rule == "centered" else score


def score_by_queries(
    call: AttentionCall, chunks: Chunks, start: int, stop: int, block: int, queries: int, shared: bool = False
) -> Tensor:
    """Scores `[B, Hkv or 1, nQ, C]` of query blocks between `start` and `stop`, nothing averaged before softmax.

    The logarithm of the attention per token of a chunk that `queries` real queries of a block pay, summed over the
    heads that share the selection.
    """
    ends, heads = chunks.ends, 1 if shared else call.Hkv
    parts = []
    length = chunks.length.clamp_min(1)[:, None, None]
    for _, weights in sampled_weights(call, start, stop, block, queries):
        mean = weights.mean(3) if weights.shape[3] > 1 else weights[:, :, :, 0]
        mass = mean.unflatten(1, (heads, -1)).sum(2)  # [B, H, tiles, seen]
        exact = torch.float32 if mass.device.type == "mps" else torch.float64
        upto = pad(mass.to(exact).cumsum(-1), (1, 0))
        edges = torch.stack([chunks.starts, ends]).clamp(max=mass.shape[3])[:, :, None, None]  # [2, B, 1, 1, C]
        begin, end = (upto.gather(-1, e.expand(*mass.shape[:3], -1)) for e in edges)
        parts.append(((end - begin).clamp_min(0).float() / length).log())
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _mass(q: Tensor, chunks: Chunks, upto: Tensor, scale: float, shared: bool) -> Tensor:
    """Logarithm of the attention mass per token of a chunk, summed over the heads that share the selection.

    With logits of a chunk's tokens taken as normal, the mean of exp(scale * q k) is
    exp(scale * q mean + scale^2 / 2 * q^2 variance), variances per rotary plane. Softmax over chunks
    weighted with their lengths makes heads comparable; what keys have in common cancels.
    """
    b, hq, n, _ = q.shape
    hkv = chunks.statistics.shape[1]
    wanted = torch.cat([q * scale, chunks.rotary.fold(q.square()) * (0.5 * scale * scale)], -1)  # [B, Hq, nQ, D + P]
    logits = (wanted.view(b, hkv, -1, wanted.shape[-1]) @ chunks.statistics.float().mT).view(b, hq, n, -1)
    past = (chunks.ends[:, None] <= upto[:, None])[:, None]
    weight = torch.where(past, chunks.length.log()[:, None, None], -torch.inf)
    total = (logits + weight).logsumexp(-1, keepdim=True)
    density = (logits - total.nan_to_num(neginf=0.0)).unflatten(1, (1 if shared else hkv, -1))
    return density.logsumexp(2) if density.shape[2] > 1 else density[:, :, 0]


def _centre(score: Tensor, chunks: Chunks, upto: Tensor) -> Tensor:
    """Turn scores of sqrt(len) * mean(k) into those of sqrt(len) * (mean(k) - mean of earlier keys).

    Keys share a large common part, which the factor sqrt(len) turns into a liking or dislike of long chunks.
    """
    seen, length = chunks.before(upto), chunks.length[:, None, None]
    tokens = (length * seen).sum(-1, keepdim=True).clamp_min(1)
    mean = (score * length.sqrt()).masked_fill(~seen, 0).sum(-1, keepdim=True) / tokens
    return score - mean * length.sqrt()


def _bands(q: Tensor, chunks: Tensor, allowed: Tensor) -> Tensor:
    """Probabilities `[B, H, nQ, C]`: pooled `q [B, H, nQ, D]` and `chunks [B, H, C, D]` compared per rotary band.

    Averaging keys after RoPE wipes out fast channels, which then only add noise to slow ones. As Prism
    (arXiv 2602.08426): the fast half and the slow three quarters of the channel pairs are scored apart, each with a
    temperature that restores its share of the energy; there top-p of each, here the larger probability ranks.
    Pairs are taken as (d, d + D/2), Transformers' usual layout.
    """
    d = q.shape[-1]
    best = q.new_zeros(())
    for low, high in ((0, d // 4), (d // 8, d // 2)):
        cut = [*range(low, high), *range(low + d // 2, high + d // 2)]
        qz, kz = q[..., cut], chunks[..., cut]
        heat = len(cut) * d**-0.5 * _energy(qz, q) * _energy(kz, chunks)
        logits = (qz @ kz.mT / heat).masked_fill(~allowed, -torch.inf)
        best = best.maximum(logits.softmax(-1).nan_to_num(0))
    return best


def _energy(part: Tensor, whole: Tensor) -> Tensor:
    """Root mean square of `part` over that of `whole`, per head: `[B, H, 1, 1]`."""
    rms = [t.square().mean((-1, -2), keepdim=True).sqrt() for t in (part, whole)]
    return rms[0] / rms[1].clamp_min(1e-12)


def pool_queries(q: Tensor, block: int) -> Tensor:
    """Mean of `q [B, Hq, Lq, D]` over blocks of queries, `[B, Hq, nQ, D]` in float32."""
    n = q.shape[2] // block * block
    parts = [q[:, :, :n].unflatten(2, (-1, block))] if n else []
    if n < q.shape[2]:
        parts.append(q[:, :, n:][:, :, None])
    return torch.cat([p.mean(3, dtype=torch.float32) for p in parts], 2)
