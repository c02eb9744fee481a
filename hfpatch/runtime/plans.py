"""What methods want of a call, and carrying it out: plan, attend, finish."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.audit import Audit
from ..core.call import AttentionCall
from ..core.report import PhaseStats
from ..core.reweight import Columns, as_bias, reweight
from ..core.selection import Layout, Selection, intersect
from ..ops import attend, attend_out
from ..ops.torch_decode import beats_sdpa
from .chain import Chain
from .raw_call import RawCall
from .row_slice import RowSlice

_COUNTED = "_hfpatch_counted"


@dataclass(eq=False)
class Plan:
    """What is to be done for a call; `at` are its rows and queries among those of the raw call."""

    call: AttentionCall
    chain: Chain
    selection: Selection | None
    columns: list[Columns]
    at: RowSlice

    @property
    def leaves_base(self) -> bool:
        """Whether the model's own attention, which gives no lse, is not enough."""
        return bool(self.selection is not None or self.columns or self.call.bias is not None or self.chain.needs_lse)


def planned(call: AttentionCall, chain: Chain, at: RowSlice) -> Plan:
    """Ask the methods of the chain, in order."""
    selection: Selection | None = None
    columns: list[Columns] = []
    for m in chain.planners:
        points = m.points()
        if "select" in points:
            selection = intersect(selection, m.select(call))
        if "bias" in points and (bias := m.bias(call)) is not None:
            call.bias = bias if call.bias is None else call.bias + bias
        if "reweight" in points:
            columns.extend(m.reweight(call))
    if columns and selection is None and call.Lq == 1:  # one more row for the kernel, where a prefill has a matrix
        call.bias, columns = as_bias(call, columns)
    return Plan(call, chain, selection, columns, at)


def execute(
    raw: RawCall, plans: Sequence[Plan], stats: PhaseStats, audit: Audit | None = None
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, Lq, Hq, Dv]` and weights, which only the model's own attention gives."""
    b, hq, lq, _ = raw.q.shape
    own = _leaves_base(raw, plans)
    if audit is not None:
        audit.cropped += sum(bool(p.call.dropped) for p in plans)
    out, weights = (None, None) if own else _base(raw, plans, stats)
    if out is not None and not any(p.chain.looks for p in plans):
        return out, weights
    if len(plans) == 1 and (len(plans[0].at.rows), plans[0].at.length) == (b, lq):
        return _finished(plans[0], attended(plans[0], stats, audit) if out is None else out), weights
    whole = raw.q.new_zeros(b, lq, hq, raw.v.shape[-1]) if out is None else out.clone()
    for plan in plans:
        part = attended(plan, stats, audit) if own else plan.at.take(whole, 1)
        plan.at.put(whole, _finished(plan, part))
    return whole, weights


def _leaves_base(raw: RawCall, plans: Sequence[Plan]) -> bool:
    """Whether the model's own attention cannot serve the plans, or a decode step is faster without it."""
    dropped, keys = raw.kept is not None, raw.k.shape[2]
    for plan in plans:
        if plan.leaves_base or (dropped and (raw.q.shape[2] > 1 or plan.call.Lk != keys)):
            return True
    one = len(plans) == 1 and raw.q.shape[2] == 1 and plans[0].chain.executor in (None, "torch")
    return one and raw.base_name == "sdpa" and beats_sdpa(plans[0].call)


def _base(raw: RawCall, plans: Sequence[Plan], stats: PhaseStats) -> tuple[Tensor, Tensor | None]:
    if raw.kept:  # all that is left is visible, and the mask speaks of the whole cache
        raw.mask = None
    for plan in plans:
        stats.add(plan.call.layout.visible, plan.call.visible, raw.base_name)
    return raw.base()


def attended(plan: Plan, stats: PhaseStats, audit: Audit | None = None) -> Tensor:
    """Output `[B, Lq, Hq, Dv]` of the plan's call by an executor, counted; the call then has its lse."""
    call, selection = plan.call, plan.selection
    asked: Any = {
        "selection": selection, "scale": call.scale, "softcap": call.softcap, "sinks": call.sinks, "bias": call.bias,
        "executor": plan.chain.executor,
    }  # fmt: skip
    seen: int | Tensor = call.visible
    if selection is not None:
        seen = _kept(selection, call.layout)
    elif call.dropped:
        seen = call.layout.visible
    chain = plan.chain
    no_lse = not (plan.columns or chain.needs_lse or (chain.looks and selection is not None))
    if no_lse and (audit is None or selection is None):
        out, executor = attend_out(call.q, call.k, call.v, **asked)
        stats.add(seen, call.visible, executor)
        return out
    done = attend(call.q, call.k, call.v, **asked)
    stats.add(seen, call.visible, done.executor)
    if audit is not None:
        audit.look(call, selection, done.out, done.lse)
    out, call.lse, call.selection = done.out, done.lse, selection
    if plan.columns:
        out, call.lse = reweight(call, out, done.lse, plan.columns, selection)
    return out


def _kept(selection: Selection, at: Layout) -> int | Tensor:
    """Pairs that a selection keeps: counted once where layers share it, and read by nobody before the report is."""
    known: tuple[Layout, int | Tensor] | None = getattr(selection, _COUNTED, None)
    if known is None or known[0] != at:
        known = at, selection.attended(at)
        object.__setattr__(selection, _COUNTED, known)  # selections are frozen
    return known[1]


def _finished(plan: Plan, out: Tensor) -> Tensor:
    """The output after the methods that change it; those that only look come last."""
    call = plan.call
    for m in plan.chain.outputs:
        changed = m.output(call, out)
        out, call.lse = changed if isinstance(changed, tuple) else (changed, call.lse)
    for m in plan.chain.observers:
        m.observe(call, out, call.lse)
    return out
