"""The table of executors: who can run a call, and who runs it when nobody was named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Selection, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops.call import Attended, Problem, check
from hfpatch.ops.parts import leaves
from hfpatch.ops.self_check import fault

Run = Callable[[Problem], tuple[Tensor, Tensor]]
Watch = Callable[[Problem, Tensor, str], None]


class Supports(Protocol):
    """Says why a problem cannot be run, or None."""

    def __call__(self, problem: Problem, /) -> str | None: ...


@dataclass(frozen=True)
class Executor:
    """A way to compute attention: `run(problem) -> (out [B, Lq, Hq, Dv], lse [B, Hq, Lq])`.

    `run_out` gives the output of those problems for which that is faster without the lse, None for others.
    """

    name: str
    supports: Supports
    run: Run
    about: str = ""
    run_out: Callable[[Problem], Tensor | None] | None = None


@dataclass(frozen=True)
class Rule:
    """One line of the table: the executor that runs problems of these devices, kinds, phases and dtypes; None: all.

    Kinds are `causal`, `window`, `blocks` and `mask` (anything else); every range of queries must be of one of them.
    Phases are `prefill`, `chunk` (several queries and earlier keys) and `decode` (one query). With `proven`, the
    executor gives a right answer to a small problem of the kind first.
    """

    executor: str
    devices: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    phases: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    proven: bool = False

    def fits(self, problem: Problem) -> bool:
        """Whether the rule speaks of the problem."""
        return (
            (self.devices is None or problem.q.device.type in self.devices)
            and (self.dtypes is None or problem.q.dtype in self.dtypes)
            and (self.phases is None or phase(problem) in self.phases)
            and (self.kinds is None or all(kind(s) in self.kinds for s in leaves(problem.selection)))
        )


def kind(selection: Selection) -> str:
    """The kind of a selection without ranges, as the table names it."""
    kinds = {Causal: "causal", SinkWindow: "window", BlockMap: "blocks"}
    return next((name for cls, name in kinds.items() if isinstance(selection, cls)), "mask")


def phase(problem: Problem) -> str:
    """The phase of a problem, as the table names it."""
    lq, lk = problem.q.shape[2], problem.k.shape[2]
    return "decode" if lq == 1 else "prefill" if lq == lk else "chunk"


_EXECUTORS: dict[str, Executor] = {}
_WATCHING: list[Watch] = []
LISTS = frozenset({"causal", "window", "blocks"})
SEVERAL = frozenset({"prefill", "chunk"})
TABLE: list[Rule] = [
    Rule("flash", devices=frozenset({"cuda"}), kinds=frozenset({"causal"}), phases=SEVERAL, proven=True),
    Rule("torch", kinds=frozenset({"causal"})),
    Rule("triton", devices=frozenset({"cuda"}), kinds=LISTS, proven=True),
    Rule("torch"),
    Rule("reference"),
]


def register_executor(executor: Executor, rule: Rule | None = None) -> None:
    """Add an executor; a `rule` puts it before the others for the problems the rule speaks of."""
    _EXECUTORS[executor.name] = executor
    if rule is not None:
        TABLE.insert(0, rule)


def list_executors() -> list[Executor]:
    """Every executor, by name."""
    return [_EXECUTORS[n] for n in sorted(_EXECUTORS)]


def choose(problem: Problem, name: str | None = None) -> Executor:
    """The executor named, or the first of the table that can run the problem."""
    if name is not None:
        if name not in _EXECUTORS:
            raise ExecutorError(f"There is no executor called {name!r}; choose from {', '.join(sorted(_EXECUTORS))}.")
        reason = _EXECUTORS[name].supports(problem)
        if reason is not None:
            raise ExecutorError(f"Executor {name!r} cannot run this call: {reason}.")
        return _EXECUTORS[name]
    refused = []
    for rule in TABLE:
        if not rule.fits(problem):
            continue
        chosen = _EXECUTORS[rule.executor]
        reason = chosen.supports(problem)
        if reason is None and rule.proven:
            reason = fault(problem, chosen.name, chosen.run)
        if reason is None:
            return chosen
        refused.append(f"{chosen.name}: {reason}")
    raise ExecutorError(f"No executor can run this call ({'; '.join(refused)}).")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selection: Selection | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    executor: str | None = None,
) -> Attended:
    """Causal attention of `q [B, Hq, Lq, D]` over the selected keys of `k [B, Hkv, Lk, D]`, `v [B, Hkv, Lk, Dv]`.

    Query n sits at position `Lk - Lq + n`. Logits are `scale * q k`, then `tanh(. / softcap) * softcap`, then
    plus `bias [B|1, Hq|1, Lk]`; `sinks [Hq]` add one logit per head to the softmax denominator. A query that
    sees nothing gets out 0 and lse -inf (or its sink). Without padding: rows of a batch have the same length.
    """
    problem = check(q, k, v, selection, scale, softcap, sinks, bias)
    chosen = choose(problem, executor)
    out, lse = chosen.run(problem)
    _show(problem, out, chosen)
    return Attended(out, lse, chosen.name)


def attend_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    selection: Selection | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    executor: str | None = None,
) -> tuple[Tensor, str]:
    """The output of `attend` alone, and who ran it: faster where an executor can do without the lse."""
    problem = check(q, k, v, selection, scale, softcap, sinks, bias)
    chosen = choose(problem, executor)
    out = None if chosen.run_out is None else chosen.run_out(problem)
    if out is None:
        out, _ = chosen.run(problem)
    _show(problem, out, chosen)
    return out, chosen.name


def _show(problem: Problem, out: Tensor, chosen: Executor) -> None:
    for watch in _WATCHING:
        watch(problem, out, chosen.name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Show every problem run inside the block to `watch`, with its output and the executor's name."""
    _WATCHING.append(watch)
    try:
        yield
    finally:
        _WATCHING.remove(watch)


def reference_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` of the problem by its definition, in float32, watched by no one."""
    return _EXECUTORS["reference"].run(problem)
