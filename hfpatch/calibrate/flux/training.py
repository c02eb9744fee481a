"""Training Flux's routers on a frozen model: soft mixture of both branches, sparsity held by a Lagrangian."""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...api import patched_with
from ...config.patch_config import PatchConfig
from ...errors import ConfigError
from ...methods.flux.method import FluxConfig
from ...methods.flux.router import Routers
from ..unfinished import (
    Part,
    Unfinished,
    data_mark,
    model_mark,
    optimizer_tensors,
    restore_optimizer,
    under,
    with_prefix,
)
from .examples import Example
from .processes import Processes
from .soft import Constraint, SoftFlux

_STANDARD = 32


@dataclass(frozen=True)
class Recipe:
    """Targets are shares of layers to route sparse, by kind of task; rates and temperatures are the paper's.

    `batch` counts the examples of all processes together, of every kind in turn.
    """

    targets: Mapping[str, float] = field(default_factory=lambda: {"retrieval": 0.45, "holistic": 1.0})
    steps: int = 300
    batch: int = 4
    rate: float = 5e-4
    multiplier_rate: float = 1e-3
    warm_up: float = 0.2
    hot: float = 1.5
    cold: float = 1.0
    clip: float = 5.0
    seed: int = 0
    save_every: int = 50


def answer_loss(model: Any, example: Example) -> Tensor:
    """Mean next-token loss over the positions to be predicted."""
    ids = example.ids[None].to(model.device)
    keep = len(example.ids) - example.predict_from + 1
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1]
    return F.cross_entropy(logits.float(), ids[0, example.predict_from :])


class Trainer:
    """One run: `run()` trains, saves its state now and then, and returns the patch config.

    `held_out` examples are routed by argmax at every save; their loss and sparsity go to `checks`. Under
    `accelerate launch` each process takes its share of every batch.
    """

    def __init__(
        self,
        model: Any,
        config: FluxConfig,
        examples: Sequence[Example],
        recipe: Recipe,
        out: Path,
        held_out: Sequence[Example] = (),
    ) -> None:
        kinds = {e.kind for e in examples}
        if not kinds or not kinds <= set(recipe.targets):
            raise ConfigError(f"flux: no target sparsity for {sorted(kinds - set(recipe.targets)) or 'no examples'}.")
        self.model, self.config, self.recipe, self.out = model, config, recipe, out
        self.examples = {kind: [e for e in examples if e.kind == kind] for kind in sorted(kinds)}
        self.held_out = list(held_out)
        torch.manual_seed(recipe.seed)
        text = model.config.get_text_config()
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.routers = Routers(range(text.num_hidden_layers), dim).to(model.device)
        self.constraint = Constraint(recipe.targets).to(model.device)
        self.soft = SoftFlux(config, self.routers)
        self.optimizer = torch.optim.AdamW(
            self.routers.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.history: list[dict[str, float]] = []
        self.checks: list[dict[str, float]] = []
        self.processes = Processes()

    def run(self, advance: Callable[[], None] = lambda: None, resume: bool = True) -> PatchConfig:
        """Train to the end; goes on from a saved state when `resume`."""
        frozen = [(p, p.requires_grad) for p in self.model.parameters()]
        was_training = self.model.training
        self.model.eval()
        for p, _ in frozen:
            p.requires_grad_(False)
        try:
            with patched_with(self.model, [self.soft]):
                kept = self._unfinished()
                if resume:
                    self._load(kept)
                for _ in range(kept.done):
                    advance()
                with kept.keeping(self._part):
                    if not self.soft.standard:
                        self._standardise()
                    for step in range(kept.done, self.recipe.steps):
                        self._check(step)
                        self._step(step, kept)
                        advance()
                    self._check(self.recipe.steps)
                    kept.save()
        finally:
            for p, flag in frozen:
                p.requires_grad_(flag)
            self.model.train(was_training)
        return self.result()

    def result(self) -> PatchConfig:
        """The trained routers as a patch config, their inputs' mean and scale folded into the first linear layer."""
        tensors = {f"0.{k}": t.detach().cpu().clone() for k, t in self.routers.state_dict().items()}
        for layer, (mean, scale) in ((n, s.cpu()) for n, s in self.soft.standard.items()):
            weight = tensors[f"0.layer.{layer}.encoder.0.weight"].div_(scale)
            tensors[f"0.layer.{layer}.encoder.0.bias"] -= weight @ mean
        name = getattr(self.model.config, "name_or_path", None) or None
        return PatchConfig([self.config], name, tensors)

    @torch.no_grad()
    def _standardise(self) -> None:
        """Find mean and scale of what the routers read; the part common to all prompts is most of it."""
        self.soft.gathered = {}
        kinds = list(self.examples.values())
        for n in range(_STANDARD):
            some = kinds[n % len(kinds)]
            self._one(some[n // len(kinds) % len(some)])
        for layer, rows in self.soft.gathered.items():
            x = torch.cat(rows)
            scale = x.var(0).mean().sqrt().clamp_min(1e-6)
            self.soft.standard[layer] = torch.stack([x.mean(0), scale.expand(x.shape[1])])
        self.soft.gathered = None

    def _step(self, step: int, kept: Unfinished) -> None:
        r = self.recipe
        done = step / r.steps
        self.soft.temperature = r.cold + (r.hot - r.cold) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / 0.6)))
        warm = min(1.0, (step + 1) / max(1.0, r.warm_up * r.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = r.rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        rng = random.Random(f"{r.seed}-{step}")
        kinds = list(self.examples)
        batch = [rng.choice(self.examples[kinds[n % len(kinds)]]) for n in range(r.batch)]
        found = []
        self.optimizer.zero_grad()
        for n in self.processes.share(r.batch):
            self.soft.noise = torch.Generator().manual_seed(((r.seed * r.steps + step) * r.batch + n) % 2**63)
            loss, sparsity = self._one(batch[n])
            objective = loss + self.constraint(sparsity, batch[n].kind)
            if objective.requires_grad:
                (objective / r.batch).backward()
            found.append((batch[n].kind, float(loss.detach()), float(sparsity.detach())))
        self.processes.add_gradients([*self.routers.parameters(), *self.constraint.parameters()])
        nn.utils.clip_grad_norm_(self.routers.parameters(), r.clip)
        with kept.step():
            self.optimizer.step()
            self.constraint.climb(r.multiplier_rate * r.batch)
            self.history.append({"step": float(step), **_means(found)})

    def _one(self, example: Example) -> tuple[Tensor, Tensor]:
        self.soft.prompt = example.predict_from
        return answer_loss(self.model, example), self.soft.take_sparsity()

    @torch.no_grad()
    def _check(self, step: int) -> None:
        """Route what was kept aside, where that is due after so many steps and has not been done."""
        due = step and (step % self.recipe.save_every == 0 or step == self.recipe.steps)
        if not due or step in [c["step"] for c in self.checks]:
            return
        self.soft.noise = None
        found = []
        for example in self.held_out:
            loss, sparsity = self._one(example)
            found.append((example.kind, float(loss), float(sparsity)))
        if found:
            self.checks.append({"step": float(step), **_means(found)})

    def _unfinished(self) -> Unfinished:
        every = [e for some in (*self.examples.values(), self.held_out) for e in some]
        words = [(e.predict_from, e.kind) for e in every]
        run = {
            "calibration": "flux", "recipe": asdict(self.recipe), "sparse": self.config.to_dict(),
            "model": model_mark(self.model), "examples": data_mark([e.ids for e in every], words),
        }  # fmt: skip
        return Unfinished(self.out, run, "steps", self.recipe.steps, writes=self.processes.first)

    def _part(self) -> Part:
        tensors = {
            **with_prefix("routers.", self.routers.state_dict()),
            **with_prefix("constraint.", self.constraint.state_dict()),
            **with_prefix("optimizer.", optimizer_tensors(self.optimizer)),
            **{f"standard.{layer}": t for layer, t in self.soft.standard.items()},
        }
        return {"history": self.history, "checks": self.checks}, tensors

    def _load(self, kept: Unfinished) -> None:
        part = kept.load()
        if part is None:
            return
        data, tensors = part[0], {name: t.to(self.model.device) for name, t in part[1].items()}
        with kept.fitting():
            self.routers.load_state_dict(under("routers.", tensors))
            self.constraint.load_state_dict(under("constraint.", tensors))
            restore_optimizer(self.optimizer, under("optimizer.", tensors))
            self.soft.standard = {int(n): t for n, t in under("standard.", tensors).items()}
            self.history, self.checks = (
                [{"step": float(line["step"]), **line} for line in data[k]] for k in ("history", "checks")
            )


def _means(found: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Mean loss, and mean loss and sparsity by kind."""
    rows = list(found)
    means = {"loss": sum(loss for _, loss, _ in rows) / max(1, len(rows))}
    for kind in sorted({k for k, _, _ in rows}):
        own = [(loss, sparsity) for k, loss, sparsity in rows if k == kind]
        means[kind] = sum(s for _, s in own) / len(own)
        means[f"{kind} loss"] = sum(loss for loss, _ in own) / len(own)
    return means
