"""Counting one method: a prompt, a chunk after it and decode steps of a tiny model on the pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from methods_list import MethodCase
from torch import Tensor
from transformers import DynamicCache, StaticCache

from hfpatch import patch_model
from hfpatch.core.call import rows_on

from .log import Counts
from .modes import move, pretending
from .tensors import OnGpu, held, log

LAYERS = 2  # the first of a forward pass asks what the others are told
LENGTH, CHUNK, STEPS = 48, 33, 5  # a chunk of 32 tokens or fewer would run as decode steps
PADS = 7
PHASES = ("prefill", "chunk", "first step", "later steps")
EXECUTORS = ("torch", "triton")
WAYS = ("one prompt", "three padded prompts", "a static cache")


@dataclass
class Cell:
    """Of one phase, by layer: operations and waits of the call that has most."""

    ops: dict[int, int] = field(default_factory=dict)
    waits: dict[int, int] = field(default_factory=dict)

    def take(self, counts: Counts) -> None:
        """Take in a layer call."""
        for found, new in ((self.ops, counts.ops), (self.waits, counts.waits.total())):
            found[counts.layer] = max(found.get(counts.layer, 0), new)


@dataclass
class Counted:
    """What one run did: a cell per phase, the layer calls themselves, and how far its logits are from the CPU's."""

    cells: dict[str, Cell]
    calls: dict[str, list[Counts]]
    outside: Counts
    error: float

    @property
    def layers(self) -> int:
        """Layers of the model that were counted."""
        return len(self.cells[PHASES[0]].ops)


def count(case: MethodCase, executor: str | None, way: str = "one prompt", model: str = "llama") -> Counted:
    """Run the method on the pretended GPU and on the CPU."""
    cells = {phase: Cell() for phase in PHASES}
    calls: dict[str, list[Counts]] = {phase: [] for phase in PHASES}
    log.reset()
    rows_on.cache_clear()
    tiny = zoo.SUPPORTED[model].build(num_hidden_layers=LAYERS)
    with pretending():
        move(tiny)
        patch_model(tiny, case.name, **case.settings, executor=executor)
        seen = []
        for phase, logits in _phases(tiny, way, OnGpu):
            for counts in log.calls:
                cells[phase].take(counts)
            calls[phase] += log.calls
            log.calls = []
            seen.append(held(logits))
    plain = zoo.SUPPORTED[model].build(num_hidden_layers=LAYERS)
    patch_model(plain, case.name, **case.settings)
    rows = slice(PADS, None) if way == WAYS[1] else slice(None)
    error = 0.0
    with torch.no_grad():
        for (phase, want), got in zip(_phases(plain, way, lambda x: x), seen, strict=True):
            some = rows if phase == "prefill" else slice(None)
            gap = (want - got)[:, some].abs().nan_to_num(nan=float("inf")).max() / want.abs().max()
            error = max(error, float(gap))
    return Counted(cells, calls, log.outside, error)


def _phases(model: Any, way: str, wrap: Any) -> Iterator[tuple[str, Tensor]]:
    """(phase, logits) of each call of the model."""
    total, batch = LENGTH + CHUNK + STEPS, 3 if way == WAYS[1] else 1
    ids, mask = zoo.prompt(model, batch, total), torch.ones(batch, total, dtype=torch.long)
    mask[::2, :PADS] = 0 if way == WAYS[1] else 1  # rows that do not lie side by side share their padding
    cache = StaticCache(model.config, max_cache_len=total + 3) if way == WAYS[2] else DynamicCache()
    done = 0
    for phase, n in zip(("prefill", "chunk", "first step", *["later steps"] * (STEPS - 1)), _sizes(), strict=True):
        given = {"attention_mask": wrap(mask[:, : done + n].clone())} if way == WAYS[1] else {}
        given[zoo.cache_name(model)] = cache
        out = model(input_ids=wrap(ids[:, done : done + n].clone()), use_cache=True, **given)
        done += n
        yield phase, out.logits


def _sizes() -> list[int]:
    return [LENGTH, CHUNK, *[1] * STEPS]
