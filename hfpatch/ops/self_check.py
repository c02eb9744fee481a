"""Trust in a kernel, earned before its first use: the problem in small, compared with the reference."""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Layout, Rows, Selection, SinkWindow
from hfpatch.ops import reference
from hfpatch.ops.call import Problem
from hfpatch.ops.parts import leaves

KEYS, QUERIES = 257, 129  # odd ones, of several blocks
EXACT = 1e-4
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
_FOUND: dict[Hashable, str | None] = {}


def fault(problem: Problem, name: str, run: Callable[[Problem], tuple[Tensor, Tensor]]) -> str | None:
    """What is wrong with an executor for problems like this one, or None; looked at once per kind and device.

    Like it are those of its dtype, head dims, group size, extras, block sizes and phase: what kernels are made for.
    """
    key = (name, problem.q.device, *_kind(problem))
    return looked_at_once(key, f"Executor {name!r} is", lambda: _looked_at(problem, run))


def looked_at_once(key: Hashable, what: str, look: Callable[[], str | None]) -> str | None:
    """What `look()` has found wrong, or what a small problem ended with; remembered, with a warning the first time."""
    if key not in _FOUND:
        try:
            found = look()
        except Exception as raised:  # whatever a compiler or a driver may raise
            found = f"a small problem ended with {type(raised).__name__}: {raised!s:.200}"
        _FOUND[key] = found
        if found is not None:
            warnings.warn(f"{what} left aside for some calls: {found}.", stacklevel=3)
    return _FOUND[key]


def _kind(p: Problem) -> tuple[Hashable, ...]:
    selections = tuple(
        (type(s).__name__, *((s.block_q, s.block_k, _heads(s, p.at)) if isinstance(s, BlockMap) else ()))
        for s in leaves(p.selection)
    )
    extras = tuple(x is not None for x in (p.softcap, p.sinks, p.bias))
    return p.q.dtype, p.q.shape[-1], p.v.shape[-1], p.groups, extras, p.at.Lq == 1, selections


def _looked_at(problem: Problem, run: Callable[[Problem], tuple[Tensor, Tensor]]) -> str | None:
    """Run the problem in small; its numbers come from a generator of their own."""
    small = _small(problem)
    on_cpu: dict[str, Any] = {n: t.cpu() for n, t in vars(small).items() if isinstance(t, Tensor)}
    want = reference.run(replace(small, **on_cpu, selection=_moved(small.selection, torch.device("cpu"))))
    got_on_cpu = [t.cpu() for t in run(small)]
    for what, a, b in zip(("output", "lse"), want, got_on_cpu, strict=True):
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return f"its {what} of a small problem has NaN or infinities in the wrong places"
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        wrong = float((a - b).norm() / a.norm().clamp_min(1e-9))
        if wrong > ALLOWED.get(problem.q.dtype, EXACT):
            return f"its {what} of a small problem is wrong by {wrong:.1e} of its norm"
    return None


def _small(p: Problem) -> Problem:
    """A problem of the same kind with two key-value heads at most and a few hundred keys."""
    hkv, lq = min(p.k.shape[1], 2), 1 if p.at.Lq == 1 else QUERIES
    made = torch.Generator("cpu").manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, device="cpu").to(p.q.device, p.q.dtype)

    q = numbers(2, hkv * p.groups, lq, p.q.shape[-1])
    k, v = numbers(2, hkv, KEYS, p.q.shape[-1]), numbers(2, hkv, KEYS, p.v.shape[-1])
    at = Layout(2, hkv * p.groups, hkv, lq, KEYS, p.q.device)
    ranges = leaves(p.selection)
    stops = [lq * n // len(ranges) for n in range(len(ranges) + 1)]
    parts = [
        (b, _choice(s, at.rows(a, b), made, _heads(s, p.at)))
        for s, a, b in zip(ranges, stops[:-1], stops[1:], strict=True)
        if a < b
    ]
    chosen = Rows(parts) if len(parts) > 1 else parts[0][1]
    sinks = None if p.sinks is None else numbers(at.Hq)
    bias = None if p.bias is None else numbers(1, 1, KEYS)
    return Problem(q, k, v, chosen, p.q.shape[-1] ** -0.5, p.softcap, sinks, bias)


def _heads(s: Selection, at: Layout) -> str:
    """Who shares a choice of blocks."""
    shared = {at.Hq: "head", at.Hkv: "group"}
    return shared.get(s.indices.shape[1], "all") if isinstance(s, BlockMap) else ""


def _choice(s: Selection, at: Layout, made: torch.Generator, heads: str) -> Selection:
    """Some blocks of the selection's sizes, some of its windows, or all keys."""
    if isinstance(s, SinkWindow):
        return SinkWindow(4, 50)
    if not isinstance(s, BlockMap):
        return Causal()
    nq, nk = -(-at.Lq // s.block_q), -(-at.Lk // s.block_k)
    shape = (at.B, {"head": at.Hq, "group": at.Hkv, "all": 1}[heads], nq)
    order = torch.rand(*shape, nk, generator=made, device="cpu").argsort(-1)[..., : max(1, nk // 2)]
    counts = torch.randint(1, order.shape[-1] + 1, shape, generator=made, device="cpu")
    return BlockMap(order.to(at.device), counts.to(at.device), s.block_q, s.block_k)


def _moved(s: Selection, device: torch.device) -> Selection:
    if isinstance(s, Rows):
        return Rows([(stop, _moved(part, device)) for stop, part in s.parts])
    return BlockMap(s.indices.to(device), s.counts.to(device), s.block_q, s.block_k) if isinstance(s, BlockMap) else s
