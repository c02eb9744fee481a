"""Runs one attention call: route, select, attend, regroup, output, observe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache_crop import check_croppable, crop_layer
from .cache_state import split_states
from .call import AttentionCall, Span
from .errors import CacheError, InputError
from .injection import RawCall, is_compiling
from .method import Method
from .ops import attend
from .padding import RowGroup
from .regroup import Columns, regroup
from .report import PhaseStats
from .selection import Selection, intersect

_START = "hfpatch-start"


@dataclass(eq=False)
class Plan:
    """What is to be done for rows that share their padding (`whole`) and their route (`call`)."""

    call: AttentionCall
    whole: AttentionCall
    methods: list[Method]
    group: RowGroup
    selection: Selection | None
    columns: list[Columns]

    @property
    def needs_lse(self) -> bool:
        """Whether the base implementation, which gives no lse, is not enough."""
        return bool(
            self.selection is not None
            or self.columns
            or self.call.bias is not None
            or any("lse" in m.needs for m in self.methods)
        )


class LayerRuntime:
    """The methods of one attention module and what they did."""

    base_config: Any

    def __init__(self, name: str, layer: int, num_layers: int, methods: Sequence[Method]) -> None:
        self.name, self.layer, self.num_layers = name, layer, num_layers
        self.methods = list(methods)
        self.needs = frozenset[str]().union(*(m.needs for m in self.methods))
        self._retaining = [m for m in self.methods if m.retains]
        self.retains = bool(self._retaining)
        self.stats: dict[str, PhaseStats] = {}
        self.spans: Mapping[str, Sequence[Span]] = {}
        self._acting = {
            phase: [m for m in self.methods if m.points() and (phase if phase != "chunk" else "prefill") in m.acts_in]
            for phase in ("prefill", "chunk", "decode")
        }

    def run(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        """Attention output `[B, Lq, Hq, Dv]` and weights (None unless the base gives them)."""
        if is_compiling() and not any(self._acting.values()):
            return raw.base()
        phase = raw.phase
        methods = self._acting[phase]
        if not methods:
            return self._dense(raw, phase, None)
        reason = raw.blocker()
        groups = reason or raw.groups()
        if isinstance(groups, str):
            if raw.kept:
                raise CacheError(f"{groups} asks for dense attention, but this cache was cropped; start it anew.")
            return self._dense(raw, phase, groups)
        plans = self._plan(raw, phase, methods, groups)
        stats = self._stats(phase)
        stats.calls += 1
        if any(p.needs_lse for p in plans):
            out, weights = self._execute(raw, plans, stats), None
        else:
            if raw.kept:  # all that is left is visible, and the mask speaks of the whole cache
                raw.mask = None
            out, weights = raw.base()
            for p in plans:
                stats.add(p.call.layout.visible, p.call.visible, raw.base_name)
            if any({"output", "observe"} & m.points() for p in plans for m in p.methods):
                out = self._apply_outputs(raw, plans, out)
        if self._retaining and not raw.kept:
            self._crop(raw, plans)
        return out, weights

    def _stats(self, phase: str) -> PhaseStats:
        if phase not in self.stats:
            self.stats[phase] = PhaseStats()
        return self.stats[phase]

    def _dense(self, raw: RawCall, phase: str, reason: str | None) -> tuple[Tensor, Tensor | None]:
        if not is_compiling():
            stats = self._stats(phase)
            stats.calls += 1
            (b, hq, lq, _), lk = raw.q.shape, min(raw.k.shape[2], max(raw.total, raw.q.shape[2]))
            visible = b * hq * (lq * (lk - lq) + lq * (lq + 1) // 2)
            stats.add(visible, visible, raw.base_name)
            if reason is not None:
                stats.fallbacks[reason] += 1
        return raw.base()

    def _plan(self, raw: RawCall, phase: str, methods: list[Method], groups: list[RowGroup]) -> list[Plan]:
        states = raw.states(self.name) if any(m.stateful for m in methods) else {}
        plans = []
        for group in groups:
            call = self._call(raw, phase, group)
            if call.Lq == 0:
                continue
            split_states(states, group.rows)
            call.states = states
            if raw.kept:
                self._check_kept(raw, call, group)
            for part, chosen in self._routed(call, methods):
                part_group = RowGroup(part.rows, group.start, group.stop)
                plans.append(self._plan_one(part, call, chosen, part_group))
        return plans

    def _check_kept(self, raw: RawCall, call: AttentionCall, group: RowGroup) -> None:
        """Raise CacheError when these rows want keys the cache has dropped."""
        same_start = call.state.get(_START, [group.start]) == [group.start] * call.B
        if any(m.retain(call) != raw.kept for m in self._retaining) or group.stop < raw.total or not same_start:
            raise CacheError(
                "This cache has been cropped for another route or another padding; keep both, or process the prompt "
                "anew."
            )

    def _crop(self, raw: RawCall, plans: list[Plan]) -> None:
        """Let the cache drop what no row will look at again."""
        if raw.cache is None:
            return
        check_croppable(raw.cache, raw.layer_idx)
        wanted = [(p.whole, m.retain(p.whole)) for p in plans for m in self._retaining]
        keep = wanted[0][1] if wanted else None
        starts = [0] * raw.q.shape[0]
        for p in plans:
            if p.group.stop < raw.total or keep is None or p.whole.Lk < keep.sink + keep.window:
                return
            for row in p.group.rows:
                starts[row] = p.group.start
        if keep is None or any(other != keep for _, other in wanted) or raw.total != raw.k.shape[2]:
            return
        for whole, _ in wanted:
            whole.state[_START] = [starts[r] for r in whole.rows]
        crop_layer(raw.cache, raw.layer_idx, keep, starts)

    def _call(self, raw: RawCall, phase: str, group: RowGroup) -> AttentionCall:
        off = raw.total - raw.q.shape[2]
        first, last = max(group.start - off, 0), max(group.stop - off, 0)
        start, stop = (0, raw.k.shape[2]) if raw.kept else (group.start, group.stop)
        whole = len(group.rows) == raw.q.shape[0]

        def cut(x: Tensor, a: int, b: int, dim: int = 2) -> Tensor:
            x = x if whole else x[list(group.rows)] if len(group.rows) > 1 else x[group.rows[0] : group.rows[0] + 1]
            return x if (a, b) == (0, x.shape[dim]) else x.narrow(dim, a, max(b - a, 0))

        queries = raw.queries if "queries" in self.needs else None
        return AttentionCall(
            layer=self.layer, num_layers=self.num_layers, phase=phase,
            q=cut(raw.q, first, last), k=cut(raw.k, start, stop), v=cut(raw.v, start, stop),
            scale=raw.scale, softcap=raw.softcap, sinks=raw.sinks, rows=group.rows,
            dropped=group.stop - group.start - (stop - start),
            hidden=None if raw.hidden is None else cut(raw.hidden, first, last, 1), module=raw.module,
            queries=None if queries is None else cut(queries, first, last, 1),
            spans=self.spans and self._spans_of(group.rows, raw.q.shape[0]),
        )  # fmt: skip

    def _spans_of(self, rows: Sequence[int], batch: int) -> dict[str, list[Span]]:
        """The spans of these rows; each row's beams, which stand next to each other, share its span."""
        if any(batch % len(places) for places in self.spans.values()):
            counts = ", ".join(str(len(places)) for places in self.spans.values())
            raise InputError(f"Spans are given for {counts} rows, the batch has {batch}.")
        return {name: [places[r * len(places) // batch] for r in rows] for name, places in self.spans.items()}

    def _routed(self, call: AttentionCall, methods: list[Method]) -> list[tuple[AttentionCall, list[Method]]]:
        router = next((m for m in methods if "route" in m.points()), None)
        if router is None:
            return [(call, methods)]
        others = [m for m in methods if m is not router]
        by_choice: dict[int, tuple[Method | None, list[int]]] = {}
        for row, child in enumerate(router.route(call)):
            by_choice.setdefault(id(child), (child, []))[1].append(row)
        return [(call.take(rows), [*others, child] if child else others) for child, rows in by_choice.values()]

    def _plan_one(self, call: AttentionCall, whole: AttentionCall, methods: list[Method], group: RowGroup) -> Plan:
        selection: Selection | None = None
        columns: list[Columns] = []
        for m in methods:
            points = m.points()
            if "select" in points:
                selection = intersect(selection, m.select(call))
            if "bias" in points and (bias := m.bias(call)) is not None:
                call.bias = bias if call.bias is None else call.bias + bias
            if "regroup" in points:
                columns.extend(m.regroup(call))
        return Plan(call, whole, methods, group, selection, columns)

    def _execute(self, raw: RawCall, plans: list[Plan], stats: PhaseStats) -> Tensor:
        b, hq, lq, _ = raw.q.shape
        single = len(plans) == 1 and b == plans[0].call.B and plans[0].call.Lq == lq
        result = None if single else raw.q.new_zeros(b, lq, hq, raw.v.shape[-1])
        for plan in plans:
            call = plan.call
            done = attend(
                call.q, call.k, call.v, selection=plan.selection, scale=call.scale, softcap=call.softcap,
                sinks=call.sinks, bias=call.bias, executor=self._executor(plan.methods),
            )  # fmt: skip
            attended = call.layout.visible if plan.selection is None else plan.selection.attended(call.layout)
            stats.add(attended, call.visible, done.executor)
            out, call.lse, call.selection = done.out, done.lse, plan.selection
            if plan.columns:
                out, call.lse = regroup(call, out, done.lse, plan.columns, plan.selection)
            out = self._finish(plan, out)
            if result is None:
                return out
            self._place(raw, plan, result, out)
        assert result is not None
        return result

    @staticmethod
    def _executor(methods: list[Method]) -> str | None:
        return next((m.config.executor for m in methods if m.config.executor), None)

    @staticmethod
    def _finish(plan: Plan, out: Tensor) -> Tensor:
        for m in plan.methods:
            if "output" in m.points():
                out = m.output(plan.call, out)
        for m in plan.methods:
            if "observe" in m.points():
                m.observe(plan.call, out, plan.call.lse)
        return out

    def _apply_outputs(self, raw: RawCall, plans: list[Plan], out: Tensor) -> Tensor:
        b, lq = out.shape[:2]
        if len(plans) == 1 and b == plans[0].call.B and plans[0].call.Lq == lq:
            return self._finish(plans[0], out)
        result = out.clone()
        for plan in plans:
            rows, a, z = self._span(raw, plan)
            self._place(raw, plan, result, self._finish(plan, out[rows, a:z]))
        return result

    @staticmethod
    def _span(raw: RawCall, plan: Plan) -> tuple[Tensor, int, int]:
        off = raw.total - raw.q.shape[2]
        rows = torch.tensor(plan.group.rows, device=raw.q.device)
        return rows, max(plan.group.start - off, 0), max(plan.group.stop - off, 0)

    def _place(self, raw: RawCall, plan: Plan, result: Tensor, out: Tensor) -> None:
        rows, a, z = self._span(raw, plan)
        result[rows, a:z] = out
