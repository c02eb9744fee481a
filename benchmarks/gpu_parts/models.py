"""Part 2: every method on tiny models: logits of the card against the CPU's, waits for the card, and the way back."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import zoo
from methods_list import METHODS
from torch import Tensor
from transformers import DynamicCache

from gpu_parts.context import Context
from gpu_parts.exact import apart
from gpu_parts.plan import OK, ROOT, SKIPPED, WRONG, Case, Row
from hfpatch import get_patch, patch_model, unpatch_model
from hfpatch.errors import HfpatchError

PHASES = ("prefill", "chunk", "first step", "later steps")
SIZES = (64, 36, 1, 1, 1, 1, 1)
MODELS = ("llama", "gemma2", "qwen3", "gpt_oss", "deepseek_v3")
ALLOWED = 1e-4
BY_NAME = {str(case): case for case in METHODS}
COUNTED = ROOT / "tests" / "pretend" / "counts.md"  # operations and waits, counted on a CPU
DRY = ("streaming", "block_topk")  # what a dry run has of the models behind the first, all without Triton


def cases(context: Context) -> list[Case]:
    """A case per model, method and executor."""
    found = []
    for model in MODELS:
        for case in METHODS:
            for executor in ("torch", "triton"):
                if model in case.refused or (context.dry and not _in_dry(model, str(case), executor)):
                    continue
                run = partial(_compare, context, model, str(case), executor)
                found.append(Case(f"{model} {case} {executor}", run, group=METHODS.index(case)))
    return found


def _in_dry(model: str, case: str, executor: str) -> bool:
    return (executor == "torch" and (model == "llama" or case in DRY)) or (model, case) == ("llama", "dense")


@lru_cache(maxsize=4)
def _built(model: str, device: torch.device) -> Any:
    made = zoo.SUPPORTED[model].build().to(device)
    made.config._experts_implementation = "eager"
    return made


def steps(
    context: Context, model: Any, device: torch.device, waits: bool = False
) -> tuple[list[Tensor], Row, Counter[str]]:
    """Logits of a prompt, a chunk after it and decode steps; waits for the card by phase, and where they are."""
    ids, cache = zoo.prompt(model, 1, sum(SIZES)).to(device), DynamicCache()
    logits, found, places, done = [], dict.fromkeys(PHASES, 0), Counter[str](), 0
    for phase, size in zip((*PHASES, *[PHASES[-1]] * 3), SIZES, strict=True):
        given = {zoo.cache_name(model): cache}
        if waits:
            with context.device.waits() as seen:
                out = model(input_ids=ids[:, done : done + size], use_cache=True, **given).logits
            found[phase] = max(found[phase], seen.total())
            places += seen
        else:
            out = model(input_ids=ids[:, done : done + size], use_cache=True, **given).logits
        done += size
        logits.append(out.cpu())
    return logits, found, places


@lru_cache(maxsize=4)
def _plain(context: Context, model: str) -> tuple[list[Tensor], Row, float]:
    """The unpatched model on the card: logits, waits by phase, and how far apart two runs are (sums by atomics)."""
    made = _built(model, context.device.torch)
    logits, _, _ = steps(context, made, context.device.torch)
    again, waits, _ = steps(context, made, context.device.torch, waits=True)
    return logits, waits, _furthest(logits, again)


def _furthest(want: list[Tensor], got: list[Tensor]) -> float:
    """The largest error of a call; 0 where all bits are the same."""
    pairs = list(zip(want, got, strict=True))
    return 0.0 if all(torch.equal(a, b) for a, b in pairs) else max(apart(a, b) for a, b in pairs)


@lru_cache(maxsize=4)
def _on_cpu(context: Context, model: str, name: str) -> list[Tensor]:
    cpu, case = torch.device("cpu"), BY_NAME[name]
    made = _built(model, cpu)
    patch_model(made, case.name, **case.settings)
    try:
        return steps(context, made, cpu)[0]
    finally:
        unpatch_model(made)


def _compare(context: Context, model: str, name: str, executor: str) -> Iterator[Row]:
    device, case = context.device.torch, BY_NAME[name]
    before, base, noise = _plain(context, model)
    made = _built(model, device)
    named: Row = {"model": model, "method": name, "executor": executor}
    want = _on_cpu(context, model, name)
    try:
        patch_model(made, case.name, **case.settings, executor=executor)
        try:
            got, _, _ = steps(context, made, device)
            _, waits, places = steps(context, made, device, waits=True)
            layers = len(get_patch(made).layers)
        finally:
            unpatch_model(made)
    except HfpatchError as e:
        yield {**named, "status": SKIPPED, "why": str(e)}
        return
    after, _, _ = steps(context, made, device)
    error, undone = _furthest(want, got), _furthest(before, after) <= 10 * noise
    row: Row = {**named, "status": OK, "error": error, "undone": undone, "noise": noise, "layers": layers}
    row |= {phase: (waits[phase] - base[phase]) / layers for phase in PHASES}
    expected = counted().get((name, executor)) if model == "llama" else None
    more = [] if expected is None else [p for p in PHASES if row[p] > expected[p]]
    row |= {"expected": expected, "more": ", ".join(more), "places": dict(places.most_common(8))}
    why = [f"error {error:.1e} against the CPU, allowed {ALLOWED:.0e}"] if not error <= ALLOWED else []
    why += [] if undone else ["logits after unpatch_model differ from those before"]
    yield {**row, **({"status": WRONG, "why": "; ".join(why)} if why else {})}


@lru_cache(maxsize=1)
def counted() -> dict[tuple[str, str], dict[str, float]]:
    """Waits per layer call that the CPU check has counted, by method and executor: its first table."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    text = COUNTED.read_text(encoding="utf-8") if COUNTED.exists() else ""
    for line in text.split("\n## ")[1].splitlines() if "\n## " in text else []:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [re.findall(r"\d+", cell.rpartition("/")[2]) for cell in cells[2:]]
        if len(cells) == 2 + len(PHASES) and all(numbers):
            means = [sum(map(int, n)) / len(n) for n in numbers]
            found[cells[0], cells[1]] = dict(zip(PHASES, means, strict=True))
    return found
