"""A decode step inside a graph of torch.compile, where lengths, padding and positions are tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..core.call import AttentionCall
from ..core.graph_step import GraphKeys, GraphStep, gathered
from ..core.logits import capped
from ..core.method import Method
from ..core.reweight import Columns
from ..core.selection import SinkWindow
from .cache_keep import ASK
from .cache_slot import has_room, layers_of
from .graph_state import graph_states
from .raw_call import RawCall


def outside(raw: RawCall, methods: Sequence[Method], key: str) -> str | None:
    """Why the call cannot be part of a graph as a decode step of these methods, or None."""
    if raw.q.shape[2] != 1:
        return f"{raw.q.shape[2]} tokens at once; compile decode steps, and process the prompt with the model as it is"
    if raw.mask is not None and (raw.mask.ndim != 4 or raw.mask.shape[1] != 1):
        return "an unusual mask"
    static, capacity = has_room(raw.cache, raw.slot, raw.k.shape[2]), raw.k.shape[2]
    for m in methods:
        if reason := m.graph_blocker(capacity):
            return f"{m.name}: {reason}; {ASK}"
        if _chooses(m) and not static:
            return f"{m.name}: it decodes in a graph with a StaticCache alone"
    if sum(map(_chooses, methods)) > 1:
        return f"two methods that choose keys; {ASK}"
    if any(map(_chooses, methods)) and graph_states(raw.cache, raw.slot, key) is None:
        return "the cache's prompt was not processed by the patched model outside of a graph; do that first"
    return None


def compiled_step(raw: RawCall, methods: Sequence[Method], call: AttentionCall, key: str) -> Tensor:
    """Out `[B, 1, Hq, Dv]` of attention under the model's mask and what the methods want."""
    seen, step = _visible(raw, call)
    states = graph_states(raw.cache, raw.slot, key) or {}
    keys: GraphKeys | None = None
    rules: list[SinkWindow] = []
    columns: list[Columns] = []
    for n, m in enumerate(methods):
        points = m.points()
        if "select" in points and not m.positional:
            step.state = states.get(n, {})
            keys = m.graph_select(step)
        elif "select" in points and isinstance(rule := m.select(call), SinkWindow):
            rules.append(rule)
        if "reweight" in points:
            columns += m.reweight(call)
    if keys is None and rules and rules[0].sink + rules[0].window < step.capacity:
        keys = window_keys(rules[0], step)
    k, v, seen, at = _kept(call, step, keys, seen)
    for rule in rules:
        seen = seen & rule.keep((step.length - 1)[..., None], at)
    out = _attend(call, k, v, seen[:, :, None], [(c, at[:, :, None]) for c in columns])
    for m in methods:
        if "output" in m.points():
            changed = m.output(call, out)
            out = changed[0] if isinstance(changed, tuple) else changed
    return out


def _chooses(m: Method) -> bool:
    return "select" in m.points() and not m.positional


def _visible(raw: RawCall, call: AttentionCall) -> tuple[Tensor, GraphStep]:
    """Which slots the model's mask and the cache's length show, `[B|1, 1, C]`, and the step."""
    keys, device, last = raw.k.shape[2], raw.q.device, _total(raw) - 1
    seen = (torch.arange(keys, device=device) <= last)[None, None]
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    if raw.mask is not None:
        given = (raw.mask if raw.mask.dtype == torch.bool else raw.mask == 0)[:, 0, :, :keys]
        seen, start = seen & given, given.int().argmax(-1)
    return seen, GraphStep(call, start, last, {})


def _total(raw: RawCall) -> Any:
    """Tokens seen: a number, or the counter of a static cache, which a graph must not turn into a number."""
    if raw.cache is None or not has_room(raw.cache, raw.slot, raw.k.shape[2]):
        return raw.k.shape[2]
    return layers_of(raw.cache)[raw.slot].get_seq_length()  # type: ignore[index]


def window_keys(rule: SinkWindow, step: GraphStep) -> GraphKeys:
    """The positions `[B|1, 1, sink + window]` of a sink and a window."""
    first = torch.arange(rule.sink, device=step.start.device).expand(len(step.start), -1)
    recent = step.length - rule.window + torch.arange(rule.window, device=step.start.device)
    seen = torch.cat([torch.ones_like(first, dtype=torch.bool), recent >= rule.sink], 1)
    return GraphKeys(torch.cat([first, recent], 1)[:, None], seen[:, None])


def _kept(
    call: AttentionCall, step: GraphStep, keys: GraphKeys | None, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values `[B, H, W, D]` to look at, which of them count, and their positions, `[B|1, H|1, W]`."""
    if keys is None or keys.at is None:
        at = torch.arange(step.capacity, device=seen.device) - step.start[..., None]
        return call.k, call.v, seen if keys is None else seen & keys.seen, at
    slots = step.slots(keys.at)
    shown = seen.expand(*slots.shape[:2], -1).gather(2, slots)
    inside = keys.seen & (keys.at < step.length[..., None])
    return gathered(call.k, slots), gathered(call.v, slots), shown & inside, keys.at


def _attend(
    call: AttentionCall, k: Tensor, v: Tensor, seen: Tensor, columns: Sequence[tuple[Columns, Tensor]]
) -> Tensor:
    """Out `[B, 1, Hq, Dv]` over `k [B, H, W, D]` where `seen [B|1, H|1, 1, W]`; sharing heads are one block."""
    heads = k.shape[1]
    q = call.q[:, :, 0].unflatten(1, (heads, -1))  # [B, H, G, D]
    bias: Tensor | None = None
    for group, at in columns:
        more = torch.where(group.among(at), group.head_logs.view(heads, -1, 1), 0.0)
        bias = more if bias is None else bias + more
    if call.softcap is None and call.sinks is None and q.shape[-1] == v.shape[-1]:
        mask = seen if bias is None else bias.masked_fill(~seen, -torch.inf).to(q.dtype)
        return scaled_dot_product_attention(q, k, v, mask, scale=call.scale).flatten(1, 2)[:, None]
    logits = capped((q @ k.mT).float() * call.scale, call.softcap)
    logits = (logits if bias is None else logits + bias).masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        column = call.sinks.float().view(1, heads, -1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, column], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights.to(v.dtype) @ v).flatten(1, 2)[:, None]
