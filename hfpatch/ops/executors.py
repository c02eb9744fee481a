"""The table of executors: who can run a call, and who runs it when nobody was named."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hfpatch.errors import ExecutorError
from hfpatch.ops.call import Attended, Problem, check
from hfpatch.selection import Selection

Run = Callable[[Problem], tuple[Tensor, Tensor]]


class Supports(Protocol):
    """Says why a problem cannot be run, or None."""

    def __call__(self, problem: Problem, /) -> str | None: ...


@dataclass(frozen=True)
class Executor:
    """A way to compute attention: `run(problem) -> (out [B, Lq, Hq, Dv], lse [B, Hq, Lq])`."""

    name: str
    supports: Supports
    run: Run
    about: str = ""


_EXECUTORS: dict[str, Executor] = {}
_PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("torch", "reference"), "*": ("torch", "reference")}


def register_executor(executor: Executor, *, first_on: str | None = None) -> None:
    """Add an executor; `first_on` (a device type) puts it before the others there."""
    _EXECUTORS[executor.name] = executor
    if first_on is not None:
        order = _PREFERRED.get(first_on, _PREFERRED["*"])
        _PREFERRED[first_on] = (executor.name, *(n for n in order if n != executor.name))


def list_executors() -> list[Executor]:
    """Every executor, by name."""
    return [_EXECUTORS[n] for n in sorted(_EXECUTORS)]


def choose(problem: Problem, name: str | None = None) -> Executor:
    """The executor named, or the first of the device's table that can run the problem."""
    if name is not None:
        if name not in _EXECUTORS:
            raise ExecutorError(f"There is no executor called {name!r}; choose from {', '.join(sorted(_EXECUTORS))}.")
        reason = _EXECUTORS[name].supports(problem)
        if reason is not None:
            raise ExecutorError(f"Executor {name!r} cannot run this call: {reason}.")
        return _EXECUTORS[name]
    refused = []
    for n in _PREFERRED.get(problem.q.device.type, _PREFERRED["*"]):
        reason = _EXECUTORS[n].supports(problem)
        if reason is None:
            return _EXECUTORS[n]
        refused.append(f"{n}: {reason}")
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
    return Attended(out, lse, chosen.name)
