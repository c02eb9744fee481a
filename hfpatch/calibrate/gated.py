"""Trains headwise gates on a frozen model: an experiment, no paper has a recipe for it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from ..api import Patch, patched
from ..cli.options import LAST_SEED, LONGEST, Device, Dtype, Model, number
from ..config.patch_config import CONFIG_FILE, TENSOR_FILE, PatchConfig
from ..core.call import AttentionCall
from ..core.reweight import initial_weight
from ..errors import ConfigError
from ..files.output import write_json
from ..methods.gated.method import Gated, GatedConfig
from .intervals import paired
from .options import Fresh
from .unfinished import (
    Part,
    Unfinished,
    calibration_folder,
    data_mark,
    finish,
    model_mark,
    optimizer_tensors,
    restore_optimizer,
    under,
    with_prefix,
)

RESULT_FILE = "calibration.json"


@dataclass(frozen=True)
class GateRecipe:
    """Loss KL(dense || gated) + `sparsity` times the mean gate; Adam; one text per step."""

    granularity: str = "headwise"
    steps: int = 200
    length: int = 512
    rate: float = 3e-3
    sparsity: float = 0.02
    held_out: float = 0.2
    seed: int = 0


@dataclass
class GateResult:
    """Held-out measures of the trained gates; attention shares are of later queries, means over layers and heads."""

    recipe: GateRecipe
    texts: int
    kl: tuple[float, float, float]
    loss_change: tuple[float, float, float]
    mean_gate: float
    sink_mass_before: float
    sink_mass_after: float
    sink_mass_gated: float

    def __str__(self) -> str:
        return (
            f"held-out KL to the dense model {self.kl[0]:.4f} (95 % {self.kl[1]:.4f} to {self.kl[2]:.4f}); next-token "
            f"loss {self.loss_change[0]:+.4f} ({self.loss_change[1]:+.4f} to {self.loss_change[2]:+.4f}); mean gate "
            f"{self.mean_gate:.3f}; attention to the initial token {self.sink_mass_before:.3f} -> "
            f"{self.sink_mass_after:.3f}, weighted by its gate {self.sink_mass_gated:.3f}"
        )


def calibrate_gated(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    out: str | Path,
    recipe: GateRecipe | None = None,
    *,
    layers: int | str | list[int] | None = None,
    resume: bool = True,
    advance: Callable[[], None] | None = None,
) -> GateResult:
    """Train gates from the identity with the model frozen, and write them to `out` as a patch that can be loaded.

    Continues an interrupted run of the same model, texts and recipe when `resume`. Experimental: in the paper (arXiv
    2505.06708) gates are trained with the model from scratch. Raises ConfigError.
    """
    r = recipe or GateRecipe()
    device = next(model.parameters()).device
    samples = [tokenizer(t, return_tensors="pt", truncation=True, max_length=r.length).input_ids for t in texts]
    samples = [ids.to(device) for ids in samples if ids.shape[1] >= 32]
    aside = max(1, round(len(samples) * r.held_out))
    held_out, training = samples[:aside], samples[aside:]
    if not training:
        raise ConfigError(f"{len(samples)} of the texts have 32 tokens or more; give at least two.")
    config = GatedConfig(form="double", granularity=r.granularity, layers=layers)
    run = {"calibration": "gated", "recipe": asdict(r), "layers": layers, "model": model_mark(model)}
    kept = Unfinished(out, {**run, "texts": data_mark(samples)}, "steps", r.steps)
    frozen = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in frozen:
            p.requires_grad_(False)
        with patched(model, config) as patch:
            _train(model, patch, training, r, kept, resume, advance or (lambda: None))
            tensors = {k: t.detach() for k, t in patch.config.tensors.items()}
    finally:
        for p, wanted in frozen.items():
            p.requires_grad_(wanted)
    name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    saved = PatchConfig([config], name, tensors)
    result = _measure(model, saved, held_out, r, len(samples))
    saved.save_pretrained(out)
    write_json(Path(out) / RESULT_FILE, asdict(result))
    finish(Path(out))
    return result


def _gated(patch: Patch) -> Gated:
    return next(m for m in patch.methods if isinstance(m, Gated))


class _Watched:
    """Collects gates and initial-token attention of a patched model's calls."""

    def __init__(self, method: Gated) -> None:
        self.method = method
        self.gates: list[Tensor] = []
        self.sinks: list[tuple[Tensor, Tensor]] = []

    def gate(self, call: AttentionCall) -> Tensor:
        """Gates `[B, Lq, H or H Dv]` of a call."""
        gate = self.method.gates[call.layer]
        if call.hidden is None:
            raise ConfigError("The model's attention was called without hidden states.")
        return 2 * torch.sigmoid(F.linear(call.hidden, gate["weight"].to(call.hidden)))

    def for_training(self, call: AttentionCall) -> None:
        """Keep the mean gate, with its gradient."""
        self.gates.append(self.gate(call).mean())

    def for_measuring(self, call: AttentionCall) -> None:
        """Keep mean gate, initial-token attention `[H]`, and that attention weighted by the mean gate of the head."""
        if call.layer not in self.method.gates:
            return
        gate = self.gate(call)
        share = initial_weight(call).mean((0, 2))
        per_head = gate.unflatten(-1, (call.Hq, -1)).mean((0, 1, 3))
        self.gates.append(gate.mean())
        self.sinks.append((share.mean(), (share * per_head).mean()))


def _train(
    model: nn.Module,
    patch: Patch,
    samples: list[Tensor],
    r: GateRecipe,
    kept: Unfinished,
    resume: bool,
    advance: Callable[[], None],
) -> None:
    method = _gated(patch)
    with torch.no_grad():
        model(samples[0], use_cache=False)
    weights = method.tensors()
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights.values()], lr=r.rate)
    if resume and (found := kept.load()):
        with kept.fitting(), torch.no_grad():
            for name, w in weights.items():
                w.copy_(found[1][f"gate.{name}"])
            restore_optimizer(optimizer, under("optimizer.", found[1]))
    for _ in range(kept.done):
        advance()

    def part() -> Part:
        return {}, {**with_prefix("gate.", weights), **with_prefix("optimizer.", optimizer_tensors(optimizer))}

    seen = _Watched(method)
    with kept.keeping(part):
        for step, ids in enumerate(islice(_endless(samples, r.seed), r.steps)):
            if step < kept.done:
                continue
            for group in optimizer.param_groups:
                group["lr"] = r.rate * (1 - step / r.steps)
            with patched(model, "dense"), torch.no_grad():
                want = model(ids, use_cache=False).logits.float()
            method.watch = seen.for_training
            got = model(ids, use_cache=False).logits.float()
            method.watch = None
            loss = divergence(want, got).mean() + r.sparsity * torch.stack(seen.gates).mean()
            seen.gates.clear()
            optimizer.zero_grad()
            loss.backward()
            with kept.step():
                optimizer.step()
            advance()
    for w in weights.values():
        w.requires_grad_(False)


def _endless(samples: list[Tensor], seed: int) -> Iterator[Tensor]:
    rng = random.Random(seed)
    while True:
        yield from rng.sample(samples, len(samples))


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """KL(want || got) `[...]` of logits `[..., V]`."""
    p = want.log_softmax(-1)
    return (p.exp() * (p - got.log_softmax(-1))).sum(-1)


@torch.no_grad()
def _measure(model: nn.Module, saved: PatchConfig, samples: list[Tensor], r: GateRecipe, texts: int) -> GateResult:
    kl, change = [], []
    watched: dict[str, _Watched] = {}
    identity = PatchConfig(saved.methods, None, {k: torch.zeros_like(t) for k, t in saved.tensors.items()})
    for ids in samples:
        logits = {}
        for name, config in (("before", identity), ("after", saved)):
            with patched(model, config) as patch:
                method = _gated(patch)
                seen = watched.setdefault(name, _Watched(method))
                seen.method, method.watch = method, seen.for_measuring
                logits[name] = model(ids, use_cache=False).logits.float()
        kl.append(divergence(logits["before"], logits["after"]).mean())
        loss = {n: F.cross_entropy(x[0, :-1], ids[0, 1:]) for n, x in logits.items()}
        change.append(loss["after"] - loss["before"])
    zero = torch.zeros(len(kl))

    def share(name: str, which: int) -> float:
        return float(torch.stack([s[which] for s in watched[name].sinks]).mean())

    return GateResult(
        recipe=r, texts=texts,
        kl=paired(torch.stack(kl).cpu(), zero), loss_change=paired(torch.stack(change).cpu(), zero),
        mean_gate=float(torch.stack(watched["after"].gates).mean()), sink_mass_before=share("before", 0),
        sink_mass_after=share("after", 0), sink_mass_gated=share("after", 1),
    )  # fmt: skip


def running_texts(source: str, count: int, tokens: int, tokenizer: Any, seed: int = 0) -> list[str]:
    """Texts of at least `tokens` tokens from `source` (grammar, prose, a file)."""
    from ..text.sources import sentences

    found = []
    for n in range(count):
        stream, body, size = sentences(source, random.Random(f"gated-{seed}-{n}")), [], 0
        while size < tokens:
            body.append(next(stream))
            size += len(tokenizer(" " + body[-1], add_special_tokens=False)["input_ids"])
        found.append(" ".join(body))
    return found


def gated(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the gates; a patch config that can be loaded or pushed.")],
    text: Annotated[str, typer.Option(help="Text to train on: grammar, prose, or the path of a text file.")] = "prose",
    texts: Annotated[int, number("Texts to draw; a fifth is held out.", 2)] = 100,
    steps: Annotated[int, number("Optimiser steps, one text each.", 1)] = 200,
    length: Annotated[int, number("Tokens per text.", 32, LONGEST)] = 512,
    rate: Annotated[float, number("Learning rate, falling to zero.", 0, 1)] = 3e-3,
    sparsity: Annotated[float, number("Weight of the mean gate in the loss.", 0, 1000)] = 0.02,
    granularity: Annotated[str, typer.Option(help="headwise or elementwise.")] = "headwise",
    layers: Annotated[str | None, typer.Option(help="Decoder layers to gate; all by default.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Annotated[int, number("Seed of texts and order.", 0, LAST_SEED)] = 0,
    fresh: Fresh = False,
) -> None:
    """Experimental: train gates on a frozen model; prints held-out KL and attention to the initial token."""
    from hfpatch.evals.run.models import check_length, load_model

    from ..cli.console import console, progress, quieten

    quieten()
    recipe = GateRecipe(granularity, steps, length, rate, sparsity, seed=seed)
    GatedConfig(form="double", granularity=granularity, layers=layers)  # refuses before anything is loaded
    with calibration_folder(out, (CONFIG_FILE, TENSOR_FILE, RESULT_FILE)):
        loaded = load_model(model, dtype, device)
        check_length(loaded, length)
        drawn = running_texts(text, texts, length, loaded.tokenizer, seed)
        with progress("gates", steps) as advance:
            result = calibrate_gated(
                loaded.model, loaded.tokenizer, drawn, out, recipe, layers=layers, resume=not fresh, advance=advance
            )
    console.print(str(result))
    console.print(f"written to {out}; use it with --patch {out}")


def add_commands(app: typer.Typer) -> None:
    """Register `gated` with the application behind `hfpatch calibrate`."""
    app.command()(gated)
