"""The flash executor: dense causality and windows through the library flash-attn where it is installed."""

from dataclasses import replace

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Rows, SinkWindow
from hfpatch.ops import flash_libraries
from hfpatch.ops.call import Problem
from hfpatch.ops.flash_libraries import Ask, Library, library
from hfpatch.ops.merge import Part, mix
from hfpatch.ops.parts import leaves, run_parts
from hfpatch.ops.torch_output import Output

DTYPES = (torch.bfloat16, torch.float16)


def supports(problem: Problem) -> str | None:
    """Dense causality, sink and window, and ranges of them, in half precision, forward only, without a bias."""
    major = flash_libraries.card(problem.q.device)
    if major is None:
        return "it needs an NVIDIA GPU"
    for sel in leaves(problem.selection):
        if isinstance(sel, BlockMap):
            return "flash-attn 4 takes block lists in its kernel's tile sizes and a mask in CuTe only, the others none"
        if not isinstance(sel, (Causal, SinkWindow)):
            return f"it does not run a {type(sel).__name__} selection"
        if isinstance(sel, SinkWindow) and sel.window < 1:
            return "its windows hold the query's own token"
    if problem.bias is not None:
        return "flash-attn takes no bias per key"
    if problem.needs_grad:
        return "its log-sum-exp has no gradient"
    if problem.q.dtype not in DTYPES:
        return f"it does not run {problem.q.dtype}"
    found = library(major, problem.q.shape[-1], problem.v.shape[-1])
    return found if isinstance(found, str) else None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]` and `lse [B, Hq, Lq]`."""
    if not isinstance(problem.selection, Rows):
        return _part(problem)
    out = Output.of(problem)
    run_parts(problem, out, _write)
    return out.out, out.lse


def _write(p: Problem, out: Output) -> None:
    o, lse = _part(p)
    out.out.copy_(o)
    out.lse.copy_(lse)


def _part(p: Problem) -> Part:
    """Attention of one range of queries, sink logits worked in."""
    major = flash_libraries.card(p.q.device)
    found = library(major or 0, p.q.shape[-1], p.v.shape[-1])
    assert isinstance(found, Library), found
    ask = Ask(p.scale, p.softcap)
    o, lse = _window(p, p.selection, found, ask) if isinstance(p.selection, SinkWindow) else _all(p, found, ask)
    return (o, lse) if p.sinks is None else with_sinks(o, lse, p.sinks)


def _all(p: Problem, lib: Library, ask: Ask) -> Part:
    return lib.run(p.q, p.k, p.v, ask)


def _window(p: Problem, sel: SinkWindow, lib: Library, ask: Ask) -> Part:
    """First tokens by a call of their own, for the queries whose window does not hold them."""
    whole = min(max(sel.sink + sel.window - p.at.off, 0), p.at.Lq)
    if sel.sink < 1 and whole < p.at.Lq:
        return _all(p, lib, replace(ask, window=sel.window))
    if whole == p.at.Lq:
        return _all(p, lib, ask)
    q, first = p.q[:, :, whole:], p.at.off + whole - sel.window + 1
    sinks = lib.run(q, p.k[:, :, : sel.sink], p.v[:, :, : sel.sink], replace(ask, causal=False))
    last = lib.run(q, p.k[:, :, first:], p.v[:, :, first:], replace(ask, window=sel.window))
    o, lse = mix(*((o.transpose(1, 2), lse) for o, lse in (last, sinks)))
    o = o.transpose(1, 2)
    if not whole:
        return o, lse
    begin = _all(p.rows(0, whole, Causal()), lib, ask)
    return torch.cat([begin[0], o], dim=1), torch.cat([begin[1], lse], dim=2)


def with_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> Part:
    """`o [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` once the logits `sinks [Hq]` are part of the softmax, exactly."""
    logits = sinks.float()[None, :, None]
    share = (lse - logits).sigmoid_().transpose(1, 2)[..., None]
    return (o * share).to(o.dtype), torch.logaddexp(lse, logits)
