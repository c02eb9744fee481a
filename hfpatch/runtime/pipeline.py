"""Runs the attention calls of one patched layer: straight down from the raw call to its output."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.audit import Audit
from ..core.call import AttentionCall, Span
from ..core.method import Method
from ..core.report import PhaseStats
from .attention_source import AttentionSource
from .cache_state import fit_states, note_fitting, was_lost
from .calls import Place, routed, steps
from .chain import Chain
from .compiled import compiled_step, outside
from .cropping import Cropping
from .graph_state import leave_for_graphs, leaves_tensors
from .plans import Plan, execute, planned
from .raw_call import RawCall, is_compiling
from .row_slice import RowSlice

_GUESSES = (
    "several tokens at once after a cache ran as decode steps; in assisted decoding the first guesses come with the "
    "prompt and count when it is read, so that tokens may differ from greedy ones"
)
_CHANGED = "the cache's keys were changed by hand; all that was remembered was begun anew"
_OTHERS = "tokens other than those remembered; what was worked out from keys was begun anew"
FEW = 32  # tokens at once after a cache that count as decode steps: what a speculating helper proposes


class LayerRuntime:
    """The methods of one attention module and what they did."""

    base_config: Any
    source: AttentionSource
    patched: int = 1  # layers of the patch it belongs to
    audit: Audit | None = None

    def __init__(
        self, name: str, layer: int, num_layers: int, methods: Sequence[Method], model_config: Any = None
    ) -> None:
        self.name, self.model_config, self.methods = name, model_config, list(methods)
        settings = repr([m.config for m in self.methods])
        self.key = f"{name} {hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()}"
        self.needs = frozenset[str]().union(*(m.needs for m in self.methods))
        self.place = Place(layer, num_layers, self.needs, {})
        self.cropping = Cropping(self.methods)
        self.stats: dict[str, PhaseStats] = {}
        self.notes: Counter[str] = Counter()
        self.in_graph, self.dense_in_graph = False, ""
        prefill, decode = (
            Chain([m for m in self.methods if (m.points() or m.retain) and phase in m.acts_in])
            for phase in ("prefill", "decode")
        )
        self._chains = {"prefill": prefill, "chunk": prefill, "decode": decode}
        self._idle = not prefill.methods and not decode.methods
        self._for_graphs = any(map(leaves_tensors, decode.methods))
        self._by_steps = not (decode.stepless and prefill.stepless and decode.methods == prefill.methods)
        self._later = " and ".join(m.name for m in decode.methods if m not in prefill.methods)

    @property
    def spans(self) -> Mapping[str, Sequence[Span]]:
        """The parts of the prompts that methods were told of."""
        return self.place.spans

    @spans.setter
    def spans(self, places: Mapping[str, Sequence[Span]]) -> None:
        self.place.spans = places

    def run(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        """Attention output `[B, Lq, Hq, Dv]` and weights (None unless the model's own attention gives them)."""
        if is_compiling():
            return self._in_graph(raw)
        out = self._run(raw)
        if self._for_graphs and raw.cache is not None:
            leave_for_graphs(raw, self._chains["decode"].methods, self.key, self.place)
        return out

    def _in_graph(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        """A call that torch.compile traces: a decode step or nothing to do, else a graph break that says why."""
        decode, queries = self._chains["decode"].methods, raw.q.shape[2]
        unread = not self._chains["prefill"].methods and (raw.cache is None or queries > FEW)
        if self._idle or (queries > 1 and unread):
            return raw.base()
        reason = raw.unserved() if decode else ""  # why the step is dense
        if (reason is None or queries > 1) and (broken := outside(raw, decode, self.key)):
            torch._dynamo.graph_break(msg=f"hfpatch: {broken}")
            return self._eagerly(raw)
        self.in_graph = True
        if reason is not None:
            self.dense_in_graph = reason
            return raw.base()
        at = self.place
        call = AttentionCall(
            at.layer, at.num_layers, "decode", raw.q, raw.k, raw.v, raw.scale, raw.softcap, raw.sinks,
            rows=tuple(range(raw.q.shape[0])), hidden=raw.context.hidden, module=raw.module,
        )  # fmt: skip
        return compiled_step(raw, decode, call, self.key), None

    @torch.compiler.disable
    def _eagerly(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        return self.run(raw)

    def _run(self, raw: RawCall) -> tuple[Tensor, Tensor | None]:
        phase = raw.phase
        several = phase == "chunk" and self._by_steps and raw.q.shape[2] <= FEW
        phase = "decode" if several else phase
        chain = self._chains[phase]
        self._note_what_waits(raw, phase, several)
        if not chain.methods:
            alone = phase == "prefill" and raw.cache is None and self._later
            return self._dense(raw, phase, f"no cache, and {self._later} acts in decode steps" if alone else None)
        groups = raw.blocker() or (chain.stateful and raw.forgetful) or raw.groups()
        if isinstance(groups, str):
            self.cropping.dense(raw, groups)
            return self._dense(raw, phase, groups)
        calls, plans = self._plans(raw, phase, chain, groups, several)
        stats = self._stats(phase)
        stats.calls += 1
        out = execute(raw, plans, stats, self.audit)
        self.cropping.after(raw, calls, groups)
        return out

    def _plans(
        self, raw: RawCall, phase: str, chain: Chain, groups: list[RowSlice], several: bool
    ) -> tuple[list[tuple[AttentionCall, RowSlice]], list[Plan]]:
        """The calls of rows that share their padding, and the plans for them."""
        states = self._states(raw) if chain.stateful else {}
        before, kept = raw.total - raw.q.shape[2], raw.kept
        calls: list[tuple[AttentionCall, RowSlice]] = []
        plans: list[Plan] = []
        for tokens in groups:
            call, queries = self.place.call(raw, phase, tokens, kept), tokens.after(before)
            if call.Lq == 0:
                continue
            call.states = states
            if chain.stateful and fit_states(states, tokens.rows, tokens.start, before + queries.start):
                self.notes[_OTHERS] += 1
            if kept is not None:
                self.cropping.check(kept, call)
            for first, step in steps(call, several):
                plans += _with_routes(step, chain, queries.part(first, step.Lq))
            if chain.stateful:
                note_fitting(states, tokens.rows, tokens.start, tokens.stop)
            calls.append((call, tokens))
        return calls, plans

    def _states(self, raw: RawCall) -> Any:
        states = raw.states(self.key)
        if was_lost(raw.cache, raw.slot):
            self.notes[_CHANGED] += 1
        return states

    def _dense(self, raw: RawCall, phase: str, reason: str | None) -> tuple[Tensor, Tensor | None]:
        stats = self._stats(phase)
        stats.calls += 1
        (b, hq, lq, _), lk = raw.q.shape, min(raw.k.shape[2], max(raw.total, raw.q.shape[2]))
        visible = b * hq * (lq * (lk - lq) + lq * (lq + 1) // 2)
        stats.add(visible, visible, raw.base_name)
        if reason is not None:
            stats.fallbacks[reason] += 1
        return raw.base()

    def _stats(self, phase: str) -> PhaseStats:
        if phase not in self.stats:
            self.stats[phase] = PhaseStats()
        return self.stats[phase]

    def _note_what_waits(self, raw: RawCall, phase: str, several: bool) -> None:
        """Note for the report when methods had no chance to act or to remember, or chose with tokens still guessed."""
        if several and not self._chains["prefill"].stepless:
            self.notes[_GUESSES] += 1
        if self._later and phase == "prefill" and raw.cache is None and self._chains["prefill"].methods:
            self.notes[f"{self._later} acts in decode steps, and there was no cache"] += 1
        if self._later and phase == "chunk":
            self.notes[f"{self._later} acts in decode steps; over {FEW} tokens at once after a cache are none"] += 1
        if (
            raw.cache is None
            and raw.kwargs.get("use_cache")
            and (self.cropping.retain or self._chains[phase].stateful)
        ):
            self.notes["the model was to use a cache, but its attention modules were given none to remember with"] += 1


def _with_routes(call: AttentionCall, chain: Chain, at: RowSlice) -> Iterator[Plan]:
    """A plan for the call, or one for each way that its router sends rows."""
    if chain.router is None:
        yield planned(call, chain, at)
        return
    for part, child in routed(call, chain.router):
        yield planned(part, chain.routed(child), RowSlice(part.rows, at.start, at.stop))
