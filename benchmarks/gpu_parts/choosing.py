"""Part 4: methods on one layer of an 8B shape: choosing, attention and counting apart, and the memory they need."""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

from bench import dense_calls
from layer import Layer

from gpu_parts.context import Context
from gpu_parts.device import is_card_trouble
from gpu_parts.exact import checked
from gpu_parts.kernels import DIM, HEADS, KV_HEADS
from gpu_parts.plan import FAILED, OK, SKIPPED, Case, Row, first_line
from gpu_parts.right import executors
from hfpatch import get_method
from hfpatch.config.registry import make_config
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import Causal, Selection
from hfpatch.ops.call import Problem

STEPS = 12


def settings(context: Context, tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods by label, so set that about an eighth of the visible keys is kept; decode steps keep 4096 at most."""
    block = 16 if context.dry else 128
    short: dict[str, Any] = {"min_length": 0} if context.dry else {}
    floored = {**short, "floor": 0} if context.dry else {}
    tiles = {**floored, "budget": 0.125, "block_q": block, "block_k": block}
    kept, sink = min(4096, max(16, tokens // 8)), 4 if context.dry else 64
    chunks: dict[str, Any] = {"sink": 2, "local": 4, "block_q": 8, "chunk": 4} if context.dry else {}
    return {
        "streaming": ("streaming", {"sink": sink, "window": max(8, tokens // 16 - sink)}),
        "block_topk": ("block_topk", tiles),
        "prism": ("block_topk", {**tiles, "bands": True, "window_blocks": 1}),
        "sampled": ("sampled", tiles),
        "vertical_slash": ("vertical_slash", {**tiles, "vertical": 0.05, "slash": 0.1}),
        "xattention": ("xattention", tiles),
        "flash_prefill": ("flash_prefill", tiles),
        "pattern": ("pattern", {"block": 2 * block, "window_blocks": max(1, tokens // 16 // (2 * block))}),
        "dhsa": ("dhsa", {**chunks, "budget": 0.125, "decode_budget": kept}),
        "quest": ("quest", {**short, "budget": kept}),
        "skip_softmax": ("skip_softmax", {**short, "prefill": 0.5, "decode": 0.5, "head_sharing": "group"}),
    }


DECODING = ("streaming", "quest", "dhsa")
PREFILLING = (
    "streaming", "block_topk", "sampled", "dhsa", "vertical_slash", "xattention", "flash_prefill", "prism", "pattern",
    "skip_softmax",
)  # fmt: skip


def cases(context: Context) -> list[Case]:
    """A case per length, phase and method."""
    found = []
    for length in ("128k",) if context.dry else ("32k", "128k"):
        labels = [("decode", label) for label in DECODING] + [("prefill", label) for label in PREFILLING]
        found += [Case(f"{p} {length} {x}", partial(_method_rows, context, length, p, x)) for p, x in labels]
    return found


@lru_cache(maxsize=1)
def _layer(context: Context, length: str) -> Layer:
    heads = (4, 1) if context.dry else (HEADS, KV_HEADS)
    args = argparse.Namespace(
        heads=heads[0], kv_heads=heads[1], dim=DIM, dtype="bfloat16", executor=None,
        device=str(context.device.torch),
    )  # fmt: skip
    return Layer(args, context.lengths()[length], 2 * STEPS, [])


@lru_cache(maxsize=1)
def _dense(context: Context, length: str, phase: str) -> tuple[str, Row]:
    """The fastest dense backend and its times."""
    layer = _layer(context, length)
    call = layer.call(phase, *_span(layer, phase, 0))
    times = context.device.times(dense_calls(call.q, call.k, call.v, layer.scale))
    best = min(times, key=lambda name: times[name]["ms"])
    return best, times[best]


def _span(layer: Layer, phase: str, step: int) -> tuple[int, int]:
    return (0, layer.length) if phase == "prefill" else (layer.length + step, layer.length + step + 1)


def problem(call: AttentionCall, chosen: Selection | None) -> Problem:
    """The call as executors see it."""
    return Problem(call.q, call.k, call.v, Causal() if chosen is None else chosen, call.scale)


def survived(check: Callable[[], Row]) -> Row:
    """What a check says; that it failed where it raised, unless the card itself is in trouble."""
    try:
        return check()
    except Exception as e:
        if is_card_trouble(e):
            raise
        return {"status": FAILED, "why": first_line(e)}


def _method_rows(context: Context, length: str, phase: str, label: str) -> Iterator[Row]:
    layer = _layer(context, length)
    name, given = settings(context, layer.length)[label]
    layer.methods, layer.states = [get_method(name)(make_config(name, given))], {}
    named: Row = {"length": length, "phase": phase, "method": label, "settings": given}
    if phase == "decode":
        layer.select(layer.call("prefill", 0, layer.length))
    call = layer.call(phase, *_span(layer, phase, 0))
    chosen = layer.select(call)
    for executor in executors():
        found = survived(partial(checked, problem(call, chosen), executor, context.options.failed))
        if found["status"] == OK:
            yield {**named, **found, **_times(context, layer, length, phase, executor)}
            return
        if found["status"] != SKIPPED:
            yield {**named, "executor": executor, **found}
    yield {**named, "status": SKIPPED, "why": "no executor is right on it"}


def _times(context: Context, layer: Layer, length: str, phase: str, executor: str) -> Row:
    """Medians of choosing, attention and counting, and the ratio of the first two to the fastest dense backend."""
    dense, dense_ms = _dense(context, length, phase)
    found: dict[str, list[float]] = {"select": [], "attend": [], "report": []}
    repeats = 1 if context.dry else STEPS if phase == "decode" else 3
    timed = context.device.timed
    for step in range(1, repeats + 2):
        layer.states = {} if phase == "prefill" else layer.states
        call = layer.call(phase, *_span(layer, phase, step))
        select, chosen = timed(partial(layer.select, call))
        attend, _ = timed(partial(layer.attend, call, chosen, executor))
        report, pairs = timed(partial(problem(call, chosen).selection.attended, call.layout))
        if step > 1:
            for name, ms in (("select", select), ("attend", attend), ("report", report)):
                found[name].append(ms)

    def whole() -> None:
        layer.states = {} if phase == "prefill" else layer.states
        layer.attend(call, layer.select(call), executor)

    both = [a + b for a, b in zip(found["select"], found["attend"], strict=True)]
    row: Row = {f"{name}_ms": statistics.median(ms) for name, ms in found.items()}
    row |= {"ms": statistics.median(both), "low": min(both), "high": max(both), "repeats": repeats}
    row |= {"dense": dense, "dense_ms": dense_ms["ms"], "ratio": dense_ms["ms"] / row["ms"]}
    return {**row, "density": int(pairs) / call.layout.visible, "peak_mib": context.device.peak(whole)}
