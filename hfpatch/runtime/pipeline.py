"""Runs one attention call: route, select, attend, regroup, output, observe."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.call import AttentionCall, Span
from ..core.method import Method
from ..core.report import PhaseStats
from ..core.reweight import Columns, regroup
from ..core.selection import Selection, SinkWindow, intersect
from ..errors import CacheError, InputError
from ..ops import attend
from ..ops.torch_decode import beats_sdpa, one_query, serves
from .attention_source import AttentionSource
from .cache_state import keep_fitting, note_fitting, split_states, was_lost
from .chain import Chain, Plan
from .compiled import compiled_step, compiles
from .cropping import check_kept, crop
from .padding import RowGroup
from .raw_call import RawCall, is_compiling

_GUESSES = (
    "several tokens at once after a cache ran as decode steps; in assisted decoding the first guesses come with the "
    "prompt and count when it is read, so that tokens may differ from greedy ones"
)
FEW = 32  # tokens at once after a cache that count as decode steps: what a speculating helper proposes


class LayerRuntime:
    """The methods of one attention module and what they did."""

    base_config: Any
    source: AttentionSource
    patched: int = 1  # layers of the patch it belongs to

    def __init__(
        self, name: str, layer: int, num_layers: int, methods: Sequence[Method], model_config: Any = None
    ) -> None:
        self.name, self.layer, self.num_layers, self.model_config = name, layer, num_layers, model_config
        self.methods = list(methods)
        settings = repr([m.config for m in self.methods])
        self.key = f"{name} {hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()}"
        self.needs = frozenset[str]().union(*(m.needs for m in self.methods))
        self._retaining = [m for m in self.methods if m.retains]
        self.retains = bool(self._retaining)
        self.stats: dict[str, PhaseStats] = {}
        self.notes: Counter[str] = Counter()
        self.in_graph = False
        self.spans: Mapping[str, Sequence[Span]] = {}
        prefill, decode = (
            Chain([m for m in self.methods if m.points() and phase in m.acts_in]) for phase in ("prefill", "decode")
        )
        self._chains = {"prefill": prefill, "chunk": prefill, "decode": decode}
        self._idle = not prefill.methods and not decode.methods
        self._by_steps = not (decode.stepless and prefill.stepless and decode.methods == prefill.methods)
        self._later = " and ".join(m.name for m in decode.methods if m not in prefill.methods)

    def run(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        """Attention output `[B, Lq, Hq, Dv]` and weights (None unless the base gives them)."""
        if is_compiling():
            if self._idle:
                return raw.base()
            if compiles(raw, self._chains["decode"].methods):
                self.in_graph = True
                return compiled_step(raw, self._chains["decode"].methods), None
        phase = raw.phase
        steps = phase == "chunk" and self._by_steps and raw.q.shape[2] <= FEW
        phase = "decode" if steps else phase
        chain = self._chains[phase]
        self._note_what_waits(raw, phase, steps)
        if not chain.methods:
            alone = phase == "prefill" and raw.cache is None and self._later
            return self._dense(raw, phase, f"no cache, and {self._later} acts in decode steps" if alone else None)
        kept = raw.kept
        groups = raw.blocker() or (chain.stateful and raw.forgetful) or raw.groups()
        if isinstance(groups, str):
            if kept:
                raise CacheError(f"{groups} asks for dense attention, but this cache was cropped; start it anew.")
            return self._dense(raw, phase, groups)
        plans = self._plan(raw, phase, chain, groups, kept)
        stats = self._stats(phase)
        stats.calls += 1
        if _leaves_base(raw, plans):
            out, weights = self._execute(raw, plans, stats), None
        else:
            if kept:  # all that is left is visible, and the mask speaks of the whole cache
                raw.mask = None
            out, weights = raw.base()
            for p in plans:
                stats.add(p.call.layout.visible, p.call.visible, raw.base_name)
            if any(p.chain.outputs or p.chain.observers for p in plans):
                out = self._apply_outputs(raw, plans, out)
        if self._retaining and not kept:
            crop(self._retaining, raw, plans)
        return out, weights

    def _note_what_waits(self, raw: RawCall, phase: str, steps: bool) -> None:
        """Note for the report when methods had no chance to act or to remember, or chose with tokens still guessed."""
        if steps and not self._chains["prefill"].stepless:
            self.notes[_GUESSES] += 1
        if self._later and phase == "prefill" and raw.cache is None and self._chains["prefill"].methods:
            self.notes[f"{self._later} acts in decode steps, and there was no cache"] += 1
        if self._later and phase == "chunk":
            self.notes[f"{self._later} acts in decode steps; over {FEW} tokens at once after a cache are none"] += 1
        if raw.cache is None and raw.kwargs.get("use_cache") and (self.retains or self._chains[phase].stateful):
            self.notes["the model was to use a cache, but its attention modules were given none to remember with"] += 1

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

    def _plan(
        self, raw: RawCall, phase: str, chain: Chain, groups: list[RowGroup], kept: SinkWindow | None
    ) -> list[Plan]:
        states = self._states(raw) if chain.stateful else {}
        before = raw.total - raw.q.shape[2]
        plans: list[Plan] = []
        for group in groups:
            whole = self._call(raw, phase, group, kept)
            if whole.Lq == 0:
                continue
            first = max(group.start - before, 0)
            if chain.stateful:
                split_states(states, group.rows)
                if keep_fitting(states, group.rows, group.start, before + first):
                    self.notes["tokens other than those remembered; what was worked out from keys was begun anew"] += 1
            whole.states = states
            if kept:
                check_kept(self._retaining, raw, whole, group)
            for n, call in self._steps(whole, phase, raw.q.shape[2]):
                plans.extend(self._routes(call, whole, chain, group, first + n))
            if chain.stateful:
                note_fitting(states, group.rows, group.start, group.stop)
        return plans

    def _states(self, raw: RawCall) -> Any:
        states = raw.states(self.key)
        if was_lost(raw.cache, raw.slot):
            self.notes["the cache's keys were changed by hand; all that was remembered was begun anew"] += 1
        return states

    @staticmethod
    def _steps(whole: AttentionCall, phase: str, queries: int) -> Iterator[tuple[int, AttentionCall]]:
        """The call, or its queries one by one where several count as decode steps; each with its first query."""
        if phase != "decode" or queries == 1:
            yield 0, whole
            return
        if whole.off == 0:  # rows whose padding ends here
            yield 0, replace(whole, phase="prefill")
            return
        for n in range(whole.Lq):
            yield n, whole.step(n)

    def _routes(
        self, call: AttentionCall, whole: AttentionCall, chain: Chain, group: RowGroup, first: int
    ) -> Iterator[Plan]:
        if chain.router is None:
            yield self._plan_one(call, whole, chain, group, first)
            return
        for part, child in self._routed(call, chain.router):
            rows = RowGroup(part.rows, group.start, group.stop)
            yield self._plan_one(part, whole, chain.routed(child), rows, first)

    def _call(self, raw: RawCall, phase: str, group: RowGroup, kept: SinkWindow | None) -> AttentionCall:
        q, k, v, hidden = raw.q, raw.k, raw.v, raw.context.hidden
        queries = raw.queries if "queries" in self.needs else None
        keys = k.shape[2]
        start, stop = (0, keys) if kept else (group.start, group.stop)
        if len(group.rows) != q.shape[0] or start or stop != keys or group.start or group.stop != raw.total:
            off = raw.total - q.shape[2]
            first, last = max(group.start - off, 0), max(group.stop - off, 0)
            q, k, v = group.cut(q, first, last), group.cut(k, start, stop), group.cut(v, start, stop)
            hidden = None if hidden is None else group.cut(hidden, first, last, 1)
            queries = None if queries is None else group.cut(queries, first, last, 1)
        return AttentionCall(
            layer=self.layer, num_layers=self.num_layers, phase=phase, q=q, k=k, v=v,
            scale=raw.scale, softcap=raw.softcap, sinks=raw.sinks, rows=group.rows,
            dropped=group.stop - group.start - (stop - start), hidden=hidden, module=raw.module, queries=queries,
            spans=self.spans and self._spans_of(group.rows, raw.q.shape[0]), forward=raw.context.forward,
        )  # fmt: skip

    def _spans_of(self, rows: Sequence[int], batch: int) -> dict[str, list[Span]]:
        """The spans of these rows; each row's beams, which stand next to each other, share its span."""
        if any(batch % len(places) for places in self.spans.values()):
            counts = ", ".join(str(len(places)) for places in self.spans.values())
            raise InputError(f"Spans are given for {counts} rows, the batch has {batch}.")
        return {name: [places[r * len(places) // batch] for r in rows] for name, places in self.spans.items()}

    @staticmethod
    def _routed(call: AttentionCall, router: Method) -> list[tuple[AttentionCall, Method | None]]:
        by_choice: dict[Method | None, list[int]] = {}
        for row, child in enumerate(router.route(call)):
            by_choice.setdefault(child, []).append(row)
        return [(call.take(rows), child) for child, rows in by_choice.items()]

    @staticmethod
    def _plan_one(call: AttentionCall, whole: AttentionCall, chain: Chain, group: RowGroup, first: int) -> Plan:
        selection: Selection | None = None
        columns: list[Columns] = []
        for m in chain.planners:
            points = m.points()
            if "select" in points:
                selection = intersect(selection, m.select(call))
            if "bias" in points and (bias := m.bias(call)) is not None:
                call.bias = bias if call.bias is None else call.bias + bias
            if "regroup" in points:
                columns.extend(m.regroup(call))
        return Plan(call, whole, chain, group, selection, columns, first)

    def _execute(self, raw: RawCall, plans: list[Plan], stats: PhaseStats) -> Tensor:
        b, hq, lq, _ = raw.q.shape
        single = len(plans) == 1 and b == plans[0].call.B and plans[0].call.Lq == lq
        result = None if single else raw.q.new_zeros(b, lq, hq, raw.v.shape[-1])
        for plan in plans:
            out = self._finish(plan, self._attend(plan, stats))
            if result is None:
                return out
            result[self._span(plan)] = out
        assert result is not None
        return result

    @staticmethod
    def _attend(plan: Plan, stats: PhaseStats) -> Tensor:
        call, chain, visible = plan.call, plan.chain, plan.call.visible
        attended: int | Tensor = visible
        if plan.selection is not None:
            attended = plan.selection.attended(call.layout)
        elif call.dropped:
            attended = call.layout.visible
        if plan.fits_one_query and serves(call, plan.columns):
            stats.add(attended, visible, "torch")
            return one_query(call, plan.columns)
        done = attend(
            call.q, call.k, call.v, selection=plan.selection, scale=call.scale, softcap=call.softcap,
            sinks=call.sinks, bias=call.bias, executor=chain.executor,
        )  # fmt: skip
        stats.add(attended, visible, done.executor)
        out, lse, looks = done.out, done.lse, bool(chain.outputs or chain.observers)
        if plan.columns:
            out, lse = regroup(call, out, lse, plan.columns, plan.selection, with_lse=looks)
        if looks:
            call.lse, call.selection = lse, plan.selection
        return out

    @staticmethod
    def _finish(plan: Plan, out: Tensor) -> Tensor:
        for m in plan.chain.outputs:
            out = m.output(plan.call, out)
        for m in plan.chain.observers:
            m.observe(plan.call, out, plan.call.lse)
        return out

    def _apply_outputs(self, raw: RawCall, plans: list[Plan], out: Tensor) -> Tensor:
        b, lq = out.shape[:2]
        if len(plans) == 1 and b == plans[0].call.B and plans[0].call.Lq == lq:
            return self._finish(plans[0], out)
        result = out.clone()
        for plan in plans:
            rows, some = self._span(plan)
            result[rows, some] = self._finish(plan, out[rows, some])
        return result

    @staticmethod
    def _span(plan: Plan) -> tuple[Tensor, slice]:
        """The rows and queries of the raw call that a plan is about."""
        rows = torch.tensor(plan.group.rows, device=plan.call.q.device)
        return rows, slice(plan.first, plan.first + plan.call.Lq)


def _leaves_base(raw: RawCall, plans: list[Plan]) -> bool:
    """Whether the base attention cannot serve the plans, or a decode step is faster without it."""
    for p in plans:
        if p.needs_lse:
            return True
    if len(plans) != 1 or raw.q.shape[2] != 1 or not plans[0].fits_one_query:
        return False
    return raw.base_name == "sdpa" and beats_sdpa(plans[0].call)
