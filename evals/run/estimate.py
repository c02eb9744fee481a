"""What a run will take, before it is run: two short prompts are timed, the rest is arithmetic."""

import time
from dataclasses import dataclass

import torch

from hfpatch.runtime.positions import position_table

from .cells import Cell, Runnable, Session
from .generation import text_ids
from .models import Loaded
from .runner import Run
from .timing import time_once

SHORT, LONG, NEW = 256, 1024, 4
CHILD_SECONDS = 10.0


@dataclass(frozen=True)
class Speed:
    """Seconds of a prefill are `linear * L + square * L^2`, of a decoded token `token`; `load` to load the model."""

    linear: float
    square: float
    token: float
    load: float

    def seconds(self, length: int, new_tokens: int) -> float:
        """One prompt, attended densely."""
        return self.linear * length + self.square * length**2 + new_tokens * self.token


@dataclass(frozen=True)
class Estimate:
    """Of one job: cells, prompts, seconds (None when unknown) and bytes of the largest cell, the model included."""

    label: str
    cells: int
    prompts: int
    seconds: float | None
    peak: int


def measure_speed(session: Session) -> Speed:
    """Time two short prompts, after loading the model."""
    start = time.perf_counter()
    loaded = session.loaded
    load = time.perf_counter() - start
    most = min(LONG, (position_table(loaded.model) or LONG + NEW) - NEW)
    few = most * SHORT // LONG
    time_once(loaded, text_ids(loaded, few), 1)
    short, token = time_once(loaded, text_ids(loaded, few), NEW)
    long, _ = time_once(loaded, text_ids(loaded, most), 1)
    square = max((long / most - short / few) / (most - few), 0.0)
    return Speed(max(short / few - square * few, 0.0), square, token, load)


def estimate(run: Run, session: Session, speed: Speed) -> list[Estimate]:
    """One estimate per job, as if every variant were as slow as dense."""
    return [_of_job(run, job, session.loaded, speed) for job in run.jobs]


def _of_job(run: Run, job: Runnable, loaded: Loaded, speed: Speed) -> Estimate:
    cells = job.cells(run.variants)
    prompts, seconds, peak = 0, 0.0, 0
    known = True
    for cell in cells:
        work = job.work(cell, run.variants)
        if work is None:
            known = False
            continue
        prompts += work.prompts
        seconds += work.prompts * speed.seconds(cell.length, work.new_tokens)
        seconds += work.read_again * speed.seconds(cell.length, 0)
        if work.own_process and loaded.device.type == "cpu":
            seconds += speed.load + CHILD_SECONDS
        peak = max(peak, memory_bytes(loaded, cell, work.at_once))
    return Estimate(job.label, len(cells), prompts, seconds if known else None, peak)


def memory_bytes(loaded: Loaded, cell: Cell, rows: int) -> int:
    """Weights, key-value cache, activations of a layer and, for padded batches, masks."""
    config = loaded.model.config.get_text_config()
    size = torch.finfo(loaded.model.dtype).bits // 8
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * size
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = (4 * config.hidden_size + 3 * wide) * size
    masks = 5 * rows * cell.length**2 if rows > 1 else 0
    return int(weights + rows * cell.length * (cache + activations) + masks)
