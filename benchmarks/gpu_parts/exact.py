"""Attention by its definition in float64, and what an executor's result is worth beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpu_parts.plan import OK, SKIPPED, WRONG, Row
from hfpatch.core.row_mask import row_mask
from hfpatch.core.selection import BlockMap
from hfpatch.errors import ExecutorError
from hfpatch.ops import Attended, attend
from hfpatch.ops.call import Problem
from hfpatch.ops.executors import kind, phase
from hfpatch.ops.parts import leaves

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def exact(p: Problem, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`out [B, R, Hq, Dv]` and `lse [B, Hq, R]` in float64 of the queries `rows [R]`; of all where None."""
    at = p.at
    mask = _mask(p, rows).expand(at.B, at.Hq, -1, -1)
    rows = torch.arange(at.Lq, device=p.q.device) if rows is None else rows
    out = torch.zeros(at.B, len(rows), at.Hq, p.v.shape[-1], dtype=torch.float64, device=p.q.device)
    lse = torch.zeros(at.B, at.Hq, len(rows), dtype=torch.float64, device=p.q.device)
    for b in range(at.B):
        for h in range(at.Hkv):
            heads = slice(h * p.groups, (h + 1) * p.groups)
            x = p.scale * (p.q[b, heads][:, rows].double() @ p.k[b, h].double().T)
            if p.softcap is not None:
                x = p.softcap * torch.tanh(x / p.softcap)
            if p.bias is not None:
                x = x + p.bias.expand(at.B, at.Hq, at.Lk)[b, heads, None].double()
            x = x.masked_fill(~mask[b, heads], -torch.inf)
            total = x.logsumexp(-1)
            if p.sinks is not None:
                total = torch.logaddexp(total, p.sinks[heads, None].double())
            weights = torch.exp(x - total.masked_fill(total.isneginf(), 0.0)[..., None])
            out[b, :, heads] = (weights @ p.v[b, h].double()).transpose(0, 1)
            lse[b, heads] = total
    return out, lse


def _mask(p: Problem, rows: Tensor | None) -> Tensor:
    """Bool `[B|1, Hq|1, R, Lk]` of the queries, causality in it."""
    if rows is None:
        return row_mask(p.selection, p.at, 0, p.at.Lq)
    masks = []
    for row in rows.tolist():
        m = row_mask(p.selection, p.at, row, row + 1)
        masks.append(torch.nn.functional.pad(m, (0, p.at.Lk - m.shape[-1])))
    return torch.cat(masks, dim=2)


def sampled(p: Problem, count: int = 64) -> Tensor | None:
    """Some queries of the problem, the first and the last among them; None for all where there are few."""
    lq = p.q.shape[2]
    if lq <= count:
        return None
    some = torch.randperm(lq)[: count - 2]
    return torch.cat([some, torch.tensor([0, lq - 1])]).unique().to(p.q.device)


def family(p: Problem, executor: str, layout: str = "") -> str:
    """What a check of this problem says something about: no time is printed where a check of the same failed."""
    extras = [name for name in ("sinks", "softcap", "bias") if getattr(p, name) is not None]
    dtype = str(p.q.dtype).removeprefix("torch.")
    words = [executor, phase(p), _kinds(p), dtype, f"{p.q.shape[-1]}/{p.v.shape[-1]} wide", layout, *extras]
    return " ".join(w for w in words if w)


def _kinds(p: Problem) -> str:
    return "+".join(
        dict.fromkeys(f"{kind(s)}{s.block_k if isinstance(s, BlockMap) else ''}" for s in leaves(p.selection))
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN inside the block."""
    kept = torch.empty, torch.Tensor.new_empty, torch.empty_like

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def build(*args: object, **kw: object) -> Tensor:
            made = make(*args, **kw)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return build

    torch.empty, torch.Tensor.new_empty, torch.empty_like = (filled(make) for make in kept)
    try:
        yield
    finally:
        torch.empty, torch.Tensor.new_empty, torch.empty_like = kept


def run(p: Problem, executor: str | None) -> Attended:
    """The problem by the executor named."""
    return attend(
        p.q, p.k, p.v, selection=p.selection, scale=p.scale, softcap=p.softcap, sinks=p.sinks, bias=p.bias,
        executor=executor,
    )  # fmt: skip


def judge(
    p: Problem, executor: str | None, truth: tuple[Tensor, Tensor], rows: Tensor | None, repeats: int = 3
) -> Row:
    """Errors of the executor, whether it left memory unwritten, and whether repeats give the same bits."""
    try:
        with poisoned():
            results = [run(p, executor) for _ in range(repeats)]
    except ExecutorError as e:
        return {"status": SKIPPED, "why": str(e)}
    return verdict(p, results, truth, rows)


def verdict(p: Problem, results: list[Attended], truth: tuple[Tensor, Tensor], rows: Tensor | None) -> Row:
    """What the results of repeated runs are worth."""
    first, allowed = results[0], TOLERANCE[p.q.dtype]
    out, lse = (first.out, first.lse) if rows is None else (first.out[:, rows], first.lse[:, :, rows])
    row: Row = {"executor": first.executor, "error": apart(truth[0], out), "error_lse": apart(truth[1], lse)}
    row["equal"] = all(torch.equal(r.out, first.out) and torch.equal(r.lse, first.lse) for r in results[1:])
    row["written"] = not bool(first.out.isnan().any() | first.lse.isnan().any())
    why = [f"error {row[n]:.1e}, allowed {allowed:.0e}" for n in ("error", "error_lse") if not row[n] <= allowed]
    why += [] if row["written"] else ["NaN in the output"]
    why += [] if row["equal"] else ["repeats differ"]
    return {**row, "allowed": allowed, "status": WRONG if why else OK, **({"why": "; ".join(why)} if why else {})}


def apart(truth: Tensor, got: Tensor) -> float:
    """Relative error by norm; infinite where an infinity or a NaN stands in another place."""
    truth, got = truth.double(), got.double()
    if got.isnan().any() or not torch.equal(truth.isinf(), got.isinf()):
        return float("inf")
    truth, got = (t.masked_fill(t.isinf(), 0.0) for t in (truth, got))
    return float((truth - got).norm() / truth.norm().clamp_min(1e-30))


def checked(p: Problem, executor: str | None, failed: frozenset[str], layout: str = "") -> Row:
    """A check of the very problem that is to be timed, and of what part 1 found about such problems."""
    if executor is not None and (name := family(p, executor, layout)) in failed:
        return {"executor": executor, "status": WRONG, "why": f"part 1 found it wrong: {name}"}
    rows = sampled(p)
    return {"executor": executor, **judge(p, executor, exact(p, rows), rows, repeats=2)}
