"""What Flux's routers are trained with: a soft mixture of both branches, and a Lagrangian that holds the sparsity."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...core.call import AttentionCall
from ...core.method import Method
from ...methods.flux.method import Flux, FluxConfig
from ...methods.flux.router import FULL, Routers, pool_ends
from ...ops import attend


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
