"""Dense float32 attention: the definition every other executor is tested against."""

import torch
from torch import Tensor

from hfpatch.ops.call import Problem


def supports(problem: Problem) -> str | None:
    """The reference runs everything."""
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]` in q's dtype and `lse [B, Hq, Lq]`, by the full `[B, Hq, Lq, Lk]` score matrix."""
    p, at = problem, problem.at
    k = p.k.float().repeat_interleave(p.groups, dim=1)
    v = p.v.float().repeat_interleave(p.groups, dim=1)
    logits = p.scale * (p.q.float() @ k.mT)
    if p.softcap is not None:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    if p.bias is not None:
        logits = logits + p.bias.float()[:, :, None, :]
    i, j = at.positions()
    logits = logits.masked_fill(~(p.selection.mask(at) & (j <= i)), -torch.inf)
    if p.sinks is not None:
        column = p.sinks.float().view(1, at.Hq, 1, 1).expand(at.B, at.Hq, at.Lq, 1)
        logits = torch.cat([logits, column], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None])[..., : at.Lk]
    return (weights @ v).transpose(1, 2).to(p.q.dtype).contiguous(), lse
