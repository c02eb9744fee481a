"""All earlier keys: the past unmasked, the queries' own tokens causal."""

from torch import Tensor

from hfpatch.core.selection import Causal
from hfpatch.ops import torch_masked
from hfpatch.ops.call import Problem
from hfpatch.ops.merge import Part
from hfpatch.ops.torch_kernel import Kernel
from hfpatch.ops.torch_output import Output, blocked

SHORT = 2048


def one_query(problem: Problem, kernel: Kernel) -> tuple[Tensor, Tensor] | None:
    """`out [B, 1, Hq, Dv]`, `lse [B, Hq, 1]` of a decode step in one kernel call; None where that does not serve."""
    q, dense = problem.q, isinstance(problem.selection, Causal)
    if q.shape[2] != 1 or not dense or kernel.fused is None or problem.sinks is not None:
        return None
    (b, hq, _, d), (_, hkv, lk, _), g, mask = q.shape, problem.k.shape, problem.groups, None
    if problem.bias is not None:
        mask = column_mask(problem.bias, hkv, g)[:, :, 0].expand(b, hkv, g, lk)
    out, lse = kernel.fused(q.reshape(b, hkv, g, d), problem.k, problem.v, mask, scale=problem.scale)
    return out.reshape(b, 1, hq, -1), lse.reshape(b, hq, 1)


def run(problem: Problem, out: Output, kernel: Kernel) -> None:
    """Write dense causal attention to `out`."""
    at = problem.at
    if at.Lq == 1:
        mask = None if problem.bias is None else column_mask(problem.bias, at.Hkv, problem.groups)
        out.write([kernel(blocked(problem.q, 1, at.Hkv), problem.k, problem.v, mask)])
    elif kernel.fused is None or problem.bias is not None:
        torch_masked.run(problem, out, kernel)
    elif kernel.grouped:
        out.write(_grouped(problem, kernel))
    else:
        step = at.Hkv if at.Lq <= SHORT else 1
        for b in range(at.B):
            for h in range(0, at.Hkv, step):
                _heads(problem, b, slice(h, h + step), out, kernel)


def _grouped(problem: Problem, kernel: Kernel) -> list[Part]:
    """The queries' own tokens and those before them, each in one call for all rows and heads."""
    (q, k, v), off, heads = (problem.q, problem.k, problem.v), problem.at.off, problem.at.Hkv
    o, lse = kernel.causal(q, k[:, :, off:], v[:, :, off:])
    parts = [(o.unflatten(1, (heads, -1)).transpose(2, 3), lse.unflatten(1, (heads, -1)).mT)]
    if off:
        parts.append(kernel(blocked(q, 1, heads), k[:, :, :off], v[:, :, :off]))
    return parts


def column_mask(bias: Tensor, heads: int, groups: int) -> Tensor:
    """The bias `[B|1, Hq|1, Lk]` as a mask `[B|1, Hkv|1, 1, G|1, Lk]` of blocks of query heads that share keys."""
    return bias.float().unflatten(1, (heads, groups) if bias.shape[1] > 1 else (1, 1)).unsqueeze(2)


def _heads(problem: Problem, b: int, heads: slice, out: Output, kernel: Kernel) -> None:
    off, groups = problem.at.off, problem.groups
    wide = slice(heads.start * groups, heads.stop * groups)
    q, k, v = problem.q[b, wide], problem.k[b, heads], problem.v[b, heads]
    n = k.shape[0]
    parts = [_own_tokens(q.unflatten(0, (n, groups)), k[:, off:], v[:, off:], kernel)]
    if off:
        parts.append(kernel(blocked(q[None], 1, n), k[None, :, :off], v[None, :, :off]))
    sinks = None if out.sinks is None else out.sinks[wide]
    Output(out.out[b : b + 1, :, wide], out.lse[b : b + 1, wide], sinks).write(parts)


def _own_tokens(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Part:
    """Causal attention of `q [H, G, L, D]` over `k, v [H, L, D]`, as a part `[1, H, L, G, D]`."""
    groups = q.shape[1]
    shared = [t[:, None].expand(-1, groups, -1, -1) for t in (k, v)]
    o, lse = kernel.causal(q, *shared)
    return o.transpose(1, 2)[None], lse.transpose(1, 2)[None]
