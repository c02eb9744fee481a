"""Training Flux's routers on a frozen model: soft mixture of both branches, sparsity held by a Lagrangian."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..api import patched_with
from ..call import AttentionCall
from ..errors import ConfigError
from ..method import Method
from ..methods.flux import Flux, FluxConfig
from ..ops import attend
from ..patch_config import PatchConfig
from .router import FULL, Routers, pool_ends

STATE_FILE = "training.pt"


@dataclass(frozen=True)
class Example:
    """A tokenised text `ids [L]`, the first position whose token is to be predicted, and the kind of task."""

    ids: Tensor
    predict_from: int
    kind: str


@dataclass(frozen=True)
class Recipe:
    """Targets are shares of layers to route sparse, by kind of task; rates and temperatures are the paper's."""

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
    """Mixes both branches by the routers' Gumbel-softmax, hard forward and soft backward."""

    needs = frozenset({"queries"})

    def __init__(self, config: FluxConfig, routers: Routers, seed: int) -> None:
        super().__init__(config)
        self.routers, self.pool = routers, config.pool
        self.child = Flux(config).child
        self.temperature, self.noisy = 1.0, True
        self.full_share: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        selection = self.child.select(call) if "prefill" in self.child.acts_in else None
        if selection is None or call.queries is None or call.phase == "decode":
            return out
        logits = self.routers[call.layer](pool_ends(call.queries, self.pool))
        if self.noisy:
            uniform = torch.rand(logits.shape, generator=self._generator).clamp(1e-9, 1 - 1e-9).to(logits.device)
            logits = logits - torch.log(-torch.log(uniform))
        soft = (logits / self.temperature).softmax(-1)[:, FULL]
        hard = (soft > 0.5).float()
        self.full_share.append(soft)
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
    """One run: `run()` trains, saves `STATE_FILE` now and then, and returns the patch config."""

    def __init__(self, model: Any, config: FluxConfig, examples: Sequence[Example], recipe: Recipe, out: Path) -> None:
        kinds = {e.kind for e in examples}
        if not kinds or not kinds <= set(recipe.targets):
            raise ConfigError(f"flux: no target sparsity for {sorted(kinds - set(recipe.targets)) or 'no examples'}.")
        self.model, self.config, self.examples, self.recipe, self.out = model, config, list(examples), recipe, out
        torch.manual_seed(recipe.seed)
        text = model.config.get_text_config()
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.routers = Routers(range(text.num_hidden_layers), dim)
        self.constraint = Constraint(recipe.targets)
        self.soft = SoftFlux(config, self.routers, recipe.seed)
        self.optimizer = torch.optim.AdamW(
            self.routers.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.history: list[dict[str, float]] = []

    def run(self, advance: Callable[[], None] = lambda: None, resume: bool = True) -> PatchConfig:
        """Train to the end; goes on from a saved state when `resume`."""
        frozen = [(p, p.requires_grad) for p in self.model.parameters()]
        was_training = self.model.training
        self.model.eval()
        for p, _ in frozen:
            p.requires_grad_(False)
        try:
            with patched_with(self.model, [self.soft]):
                for step in range(self._load() if resume else 0, self.recipe.steps):
                    self._step(step)
                    advance()
                    if (step + 1) % self.recipe.save_every == 0:
                        self._save(step + 1)
        finally:
            for p, flag in frozen:
                p.requires_grad_(flag)
            self.model.train(was_training)
        return self.result()

    def result(self) -> PatchConfig:
        """The trained routers as a patch config."""
        tensors = {f"0.{k}": t.detach().clone() for k, t in self.routers.state_dict().items()}
        name = getattr(self.model.config, "name_or_path", None) or None
        return PatchConfig([self.config], name, tensors)

    def _step(self, step: int) -> None:
        r = self.recipe
        done = step / r.steps
        self.soft.temperature = r.cold + (r.hot - r.cold) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / 0.6)))
        warm = min(1.0, (step + 1) / max(1.0, r.warm_up * r.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = r.rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        rng = random.Random(f"{r.seed}-{step}")
        total = {"loss": 0.0, "step": float(step)}
        self.optimizer.zero_grad()
        for example in (rng.choice(self.examples) for _ in range(r.batch)):
            loss = answer_loss(self.model, example)
            sparsity = self.soft.take_sparsity()
            objective = loss + self.constraint(sparsity, example.kind)
            if objective.requires_grad:
                (objective / r.batch).backward()
            total["loss"] += float(loss.detach()) / r.batch
            total[example.kind] = float(sparsity.detach())
        nn.utils.clip_grad_norm_(self.routers.parameters(), r.clip)
        self.optimizer.step()
        self.constraint.climb(r.multiplier_rate * r.batch)
        self.history.append(total)

    def _save(self, step: int) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        data = {
            "step": step, "examples": len(self.examples), "seed": self.recipe.seed, "steps": self.recipe.steps,
            "routers": self.routers.state_dict(), "constraint": self.constraint.state_dict(),
            "optimizer": self.optimizer.state_dict(), "history": self.history,
        }  # fmt: skip
        temporary = self.out / (STATE_FILE + ".new")
        torch.save(data, temporary)
        temporary.replace(self.out / STATE_FILE)

    def _load(self) -> int:
        file = self.out / STATE_FILE
        if not file.is_file():
            return 0
        data = torch.load(file, weights_only=True)
        r = self.recipe
        if (data["examples"], data["seed"], data["steps"]) != (len(self.examples), r.seed, r.steps):
            raise ConfigError(f"{self.out} holds an unfinished run with other settings; use another folder.")
        self.routers.load_state_dict(data["routers"])
        self.constraint.load_state_dict(data["constraint"])
        self.optimizer.load_state_dict(data["optimizer"])
        self.history = list(data["history"])
        return int(data["step"])
