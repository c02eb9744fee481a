"""Part 3: attention of one layer of an 8B shape, each executor against the fastest dense backend there is."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from bench import Shape, dense_calls, inputs, selection
from torch import Tensor

from gpu_parts.context import Context
from gpu_parts.exact import TOLERANCE, apart, checked, exact, run, sampled
from gpu_parts.plan import OK, SKIPPED, WRONG, Case, Row, first_line
from gpu_parts.right import executors
from hfpatch.ops.call import Problem

HEADS, KV_HEADS, DIM = 32, 8, 128
KEPT, WINDOW, SINK, PAGE, TILE = 4096, 2048, 64, 16, 128
LIBRARIES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}


@dataclass(frozen=True)
class Timed:
    """A shape that is timed: `prefill` or `decode`, `causal`, `window` or `blocks`, the length's name, the batch."""

    phase: str
    kind: str
    length: str
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.phase} {self.kind} {self.length} B{self.batch}"

    def problem(self, context: Context) -> Problem:
        """Random numbers of the shape; prefill keeps an eighth of the visible keys, decode 4096, windows 2048."""
        tokens = context.lengths()[self.length]
        scale = 64 if context.dry else 1
        kept = {"blocks": 32 if context.dry else tokens // 16, "window": WINDOW // scale, "causal": tokens}[self.kind]
        if self.phase == "decode":
            kept = KEPT // scale
        heads = (4, 1) if context.dry else (HEADS, KV_HEADS)
        args = argparse.Namespace(
            batch=self.batch, heads=heads[0], kv_heads=heads[1], dim=DIM, dtype="bfloat16",
            device=str(context.device.torch), keys=kept, sink=SINK // scale,
            block=PAGE if self.phase == "decode" or context.dry else TILE,
        )  # fmt: skip
        lq = 1 if self.phase == "decode" else tokens
        torch.manual_seed(0)
        q, k, v = inputs(lq, tokens, args)
        chosen = selection(Shape(self.phase, self.kind, tokens), lq, args)
        return Problem(q, k, v, chosen, args.dim**-0.5)


def shapes(context: Context) -> list[Timed]:
    """What is timed, short lengths first."""
    found = []
    for length in context.lengths():
        found += [Timed("prefill", kind, length) for kind in ("causal", "blocks", "window")]
        found += [Timed("decode", "blocks", length, batch) for batch in (1, 4)]
    return found


def cases(context: Context) -> list[Case]:
    """Dense backends of each shape, then each executor on it; torch and what PyTorch has to compile come last."""
    first, last, slow = [], [], []
    for shape in shapes(context):
        if shape.kind == "causal" or shape.phase == "decode":
            first.append(Case(f"{shape}: dense", partial(_dense_rows, context, shape)))
        for name in executors():
            case = Case(f"{shape}: {name}", partial(_executor_row, context, shape, name))
            (last if name == "torch" else slow if name == "flex" else first).append(case)
    return [*first, *last, *slow]


def variants(context: Context) -> list[tuple[str, Callable[[], Any]]]:
    """What Triton has to compile for this part."""
    found = []
    for shape in (Timed("prefill", kind, "8k") for kind in ("causal", "blocks", "window")):
        found.append((str(shape), partial(_launch, context, shape)))
    return [*found, ("decode blocks 8k", partial(_launch, context, Timed("decode", "blocks", "8k")))]


def _launch(context: Context, shape: Timed) -> Any:
    return partial(run, shape.problem(context), "triton")


@lru_cache(maxsize=1)
def _made(context: Context, shape: Timed) -> Problem:
    return shape.problem(context)


def library_calls(
    q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Dense attention of the flash-attn packages that are here and run the shape, and why others do not."""
    found: dict[str, Callable[[], Any]] = {}
    why: dict[str, str] = {}
    rows = [t.transpose(1, 2) for t in (q, k, v)]
    for name, module in LIBRARIES.items():
        try:
            call = partial(import_module(module).flash_attn_func, *rows, causal=True, softmax_scale=scale)
            call()
        except ImportError:
            why[name] = "not installed"
        except (RuntimeError, TypeError, AttributeError, NotImplementedError, ValueError) as e:
            why[name] = first_line(e)
        else:
            found[name] = call
    return found, why


@lru_cache(maxsize=1)
def dense(context: Context, shape: Timed) -> tuple[dict[str, Callable[[], Any]], dict[str, Row], dict[str, str]]:
    """Dense backends that are right on the shape's tensors: their calls and times; and why others have none."""
    p = shape.problem(context)
    calls = dense_calls(p.q, p.k, p.v, p.scale)
    more, why = library_calls(p.q, p.k, p.v, p.scale)
    why |= {
        f"dense {n}": "PyTorch does not run it here"
        for n in ("flash", "cudnn", "efficient")
        if f"dense {n}" not in calls
    }
    rows = sampled(p)
    truth = exact(p, rows)[0]
    for name, call in {**calls, **more}.items():
        error = apart(truth, _output(call(), name, rows))
        if error > TOLERANCE[p.q.dtype]:
            why[name] = f"wrong: error {error:.1e}"
    right = {name: call for name, call in {**calls, **more}.items() if name not in why}
    ready = {
        name: graph for name, call in right.items() if (graph := _ready(context, shape, name, call, why)) is not None
    }
    return ready, context.device.times(ready), why


def _ready(context: Context, shape: Timed, name: str, call: Any, why: dict[str, str]) -> Callable[[], Any] | None:
    """The call as it is timed: decode steps as the replay of a graph."""
    if shape.phase == "prefill":
        return call
    graph, reason = context.device.replay(call)
    if graph is None:
        why[name] = f"no graph: {reason}"
    return graph


def _output(result: Any, name: str, rows: Tensor | None) -> Tensor:
    out = result[0] if isinstance(result, tuple) else result
    out = out if name in LIBRARIES else out.transpose(1, 2)
    return out if rows is None else out[:, rows]


def flops(p: Problem, pairs: int) -> float:
    """Operations of both products over so many (row, head, query, key) pairs."""
    return 2.0 * pairs * (p.q.shape[-1] + p.v.shape[-1])


def _dense_rows(context: Context, shape: Timed) -> Iterator[Row]:
    p = _made(context, shape)
    _, times, why = dense(context, replace(shape, kind="causal"))
    named = {"shape": f"{shape.phase} {shape.kind}", "length": shape.length, "batch": shape.batch}
    for name, ms in times.items():
        yield {**named, "backend": name, "status": OK, **ms, "tflops": flops(p, p.at.visible) / ms["ms"] / 1e9}
    for name, reason in why.items():
        status = WRONG if reason.startswith("wrong") else SKIPPED
        yield {**named, "backend": name, "status": status, "why": reason}


def _executor_row(context: Context, shape: Timed, name: str) -> Iterator[Row]:
    named = {"shape": f"{shape.phase} {shape.kind}", "length": shape.length, "batch": shape.batch, "executor": name}
    p = _made(context, shape)
    found = checked(p, name, context.options.failed)
    if found["status"] != OK:
        yield {**found, **named}
        return
    calls, times, _ = dense(context, replace(shape, kind="causal"))
    best = min(times, key=lambda n: times[n]["ms"])
    call: Callable[[], Any] = partial(run, p, name)
    extra: Row = {}
    if shape.phase == "decode":
        extra["eager_ms"] = context.device.times({"eager": call})["eager"]["ms"]
        graph, reason = context.device.replay(call)
        if graph is None:
            yield {**named, **found, **extra, "status": SKIPPED, "why": f"no graph: {reason}"}
            return
        call = graph
    ms = context.device.times({"dense": calls[best], "mine": call})
    pairs = int(p.selection.attended(p.at))
    yield {
        **named, **found, **extra, **ms["mine"], "tflops": flops(p, pairs) / ms["mine"]["ms"] / 1e9,
        "density": pairs / p.at.visible, "dense": best, "dense_ms": ms["dense"]["ms"],
        "dense_low": ms["dense"]["low"], "dense_high": ms["dense"]["high"],
        "ratio": ms["dense"]["ms"] / ms["mine"]["ms"],
    }  # fmt: skip
