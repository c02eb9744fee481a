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
from ...core.call import AttentionCall
from ...core.method import Method
from ...errors import ConfigError
from ...methods.flux.method import Flux, FluxConfig
from ...methods.flux.router import FULL, Routers, pool_ends
from ...ops import attend
from ..training_state import load_state, of_this_model, save_state
from .examples import Example
from .processes import Processes

STATE = ("step", "settings", "history", "checks", "routers", "constraint", "optimizer", "standard")
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


class Constraint(nn.Module):
    """Lagrangian `l1 * d + l2 * d^2` with d = sparsity - target, per kind; the multipliers climb.

    l1 takes either sign and l2 stays positive, so that the penalty pulls to the target from both sides; the paper's
    l1 >= 0 would only push sparsity down.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        super().__init__()
        self.targets = dict(targets)
        self.linear = nn.ParameterDict({k: nn.Parameter(torch.zeros(())) for k in targets})
        self.quadratic = nn.ParameterDict({k: nn.Parameter(torch.ones(())) for k in targets})

    def forward(self, sparsity: Tensor, kind: str) -> Tensor:
        """Penalty of a sparsity (share of layers routed sparse)."""
        d = sparsity - self.targets[kind]
        return self.linear[kind] * d + self.quadratic[kind].clamp_min(0) * d.square()

    @torch.no_grad()
    def climb(self, rate: float) -> None:
        """One step of gradient ascent on the multipliers; clears their gradients."""
        for p in self.parameters():
            if p.grad is not None:
                p.add_(p.grad, alpha=rate)
                p.grad = None


class SoftFlux(Method):
    """Mixes both branches by the routers' Gumbel-softmax, hard forward and soft backward; without noise by argmax.

    The routers read the first `prompt` tokens of each text, as they do at inference, standardised by `standard`: a
    mean and a scale `[2, D]` per layer. While `gathered` is a dict it only collects what they would read.
    """

    needs = frozenset({"q_pre_rope"})

    def __init__(self, config: FluxConfig, routers: Routers) -> None:
        super().__init__(config)
        self.routers, self.pool = routers, config.pool
        self.child = Flux(config).child
        self.temperature, self.prompt = 1.0, 0
        self.noise: torch.Generator | None = None
        self.standard: dict[int, Tensor] = {}
        self.gathered: dict[int, list[Tensor]] | None = None
        self.full_share: list[Tensor] = []

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        selection = self.child.select(call) if "prefill" in self.child.acts_in else None
        if selection is None or call.q_pre_rope is None or call.phase == "decode":
            return out
        pooled = pool_ends(call.q_pre_rope[:, : self.prompt or None], self.pool)
        if self.gathered is not None:
            self.gathered.setdefault(call.layer, []).append(pooled)
            return out
        if call.layer in self.standard:
            pooled = (pooled - self.standard[call.layer][0]) / self.standard[call.layer][1]
        logits = self.routers[call.layer](pooled)
        if self.noise is not None:
            uniform = torch.rand(logits.shape, generator=self.noise).clamp(1e-9, 1 - 1e-9).to(logits.device)
            logits = logits - torch.log(-torch.log(uniform))
        soft = (logits / self.temperature).softmax(-1)[:, FULL]
        hard = (soft > 0.5).float()
        self.full_share.append(soft if self.noise is not None else hard)
        gate = (hard + soft - soft.detach())[:, None, None, None].to(out.dtype)
        sparse = attend(
            call.q, call.k, call.v, selection=selection, scale=call.scale, softcap=call.softcap, sinks=call.sinks
        )
        return gate * out + (1 - gate) * sparse.out

    def take_sparsity(self) -> Tensor:
        """Mean share routed sparse since the last call, with gradient."""
        share = 1 - torch.cat(self.full_share).mean() if self.full_share else torch.zeros(())
        self.full_share = []
        return share


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
                first = self._load() if resume else 0
                if not self.soft.standard:
                    self._standardise()
                for step in range(first, self.recipe.steps):
                    self._step(step)
                    advance()
                    if (step + 1) % self.recipe.save_every == 0 or step + 1 == self.recipe.steps:
                        self._check(step + 1)
                        self._save(step + 1)
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

    def _step(self, step: int) -> None:
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
        self.optimizer.step()
        self.constraint.climb(r.multiplier_rate * r.batch)
        self.history.append({"step": float(step), **_means(found)})

    def _one(self, example: Example) -> tuple[Tensor, Tensor]:
        self.soft.prompt = example.predict_from
        return answer_loss(self.model, example), self.soft.take_sparsity()

    @torch.no_grad()
    def _check(self, step: int) -> None:
        self.soft.noise = None
        found = []
        for example in self.held_out:
            loss, sparsity = self._one(example)
            found.append((example.kind, float(loss), float(sparsity)))
        if found:
            self.checks.append({"step": float(step), **_means(found)})

    def _settings(self) -> dict[str, Any]:
        counts = {kind: len(some) for kind, some in self.examples.items()}
        return {"recipe": asdict(self.recipe), "config": self.config.to_dict(), "examples": counts}

    def _save(self, step: int) -> None:
        if not self.processes.first:
            return
        data = {
            "step": step, "settings": self._settings(), "history": self.history, "checks": self.checks,
            "routers": self.routers.state_dict(), "constraint": self.constraint.state_dict(),
            "optimizer": self.optimizer.state_dict(), "standard": self.soft.standard,
        }  # fmt: skip
        save_state(self.out, data)

    def _load(self) -> int:
        data = load_state(self.out, STATE, self.model.device)
        if data is None:
            return 0
        if data["settings"] != self._settings():
            raise ConfigError(f"{self.out} holds a run with other settings; use another folder, or --fresh.")
        with of_this_model(self.out):
            self.routers.load_state_dict(data["routers"])
            self.constraint.load_state_dict(data["constraint"])
            self.optimizer.load_state_dict(data["optimizer"])
            self.soft.standard = dict(data["standard"])
        self.history, self.checks = list(data["history"]), list(data["checks"])
        return int(data["step"])


def _means(found: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Mean loss, and mean loss and sparsity by kind."""
    rows = list(found)
    means = {"loss": sum(loss for _, loss, _ in rows) / max(1, len(rows))}
    for kind in sorted({k for k, _, _ in rows}):
        own = [(loss, sparsity) for k, loss, sparsity in rows if k == kind]
        means[kind] = sum(s for _, s in own) / len(own)
        means[f"{kind} loss"] = sum(loss for loss, _ in own) / len(own)
    return means
