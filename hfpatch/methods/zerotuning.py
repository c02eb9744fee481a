"""ZeroTuning: rescale the attention every query pays to the initial token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.learned import Learned, ModelSizes
from ..core.method import Method
from ..core.reweight import Columns, initial_weight
from ..errors import ConfigError
from ..runtime.model_facts import query_heads
from ..values import shown

THIRDS = ("shallow", "middle", "deep")
ENOUGH_TOKENS = 16
NO_SINK = 0.1
LEAST, MOST = 1e-3, 1e6


@dataclass(kw_only=True)
class ZeroTuningConfig(MethodConfig):
    """Settings of `zerotuning`; factors are per query head."""

    method: ClassVar[str] = "zerotuning"
    gamma: float = option(
        1.0,
        "factor on the initial token's attention: above 1 flattens the rest, below 1 sharpens it",
        ge=LEAST,
        le=MOST,
    )
    heads: list[int] | None = option(None, "query heads that get `gamma`, the same in every layer; all when None")
    gammas: list[float] | None = option(None, "one factor per query head, instead of `gamma` and `heads`")
    depth: str = option("all", "which thirds of the model: all, or some of shallow, middle, deep with commas")

    def validate(self) -> None:
        unknown = [part for part in self.thirds if part not in THIRDS]
        if unknown:
            raise ConfigError(f"zerotuning: depth={self.depth!r} is not all or some of {', '.join(THIRDS)}.")
        if self.depth != "all" and self.layers is not None:
            raise ConfigError("zerotuning: depth and layers both choose layers; leave one of them out.")
        if self.gammas is not None and (self.gamma != 1.0 or self.heads is not None):
            raise ConfigError("zerotuning: gammas already says it for every head; leave gamma and heads out.")
        if any(not LEAST <= g <= MOST for g in self.gammas or []):
            raise ConfigError(f"zerotuning: gammas={shown(self.gammas)} must all be {LEAST} to {MOST:g}.")
        if any(h < 0 for h in self.heads or []):
            raise ConfigError(f"zerotuning: heads={shown(self.heads)} must be numbers from 0 on.")

    @property
    def thirds(self) -> tuple[str, ...]:
        """The chosen thirds of the model."""
        return THIRDS if self.depth == "all" else tuple(self.depth.replace(" ", "").split(","))


def third_of(layer: int, num_layers: int) -> str:
    """`shallow`, `middle` or `deep`; of 32 layers 0-10, 11-21 and 22-31."""
    return THIRDS[min(layer // -(-num_layers // 3), 2)]


@register_method
class ZeroTuning(Method[ZeroTuningConfig]):
    """a_0' = gamma a_0 / D, a_i' = a_i / D with D = 1 + (gamma - 1) a_0, for the first real token of each row.

    ZeroTuning, arXiv 2505.11739: the form on attention weights, applied to (out, lse) of any executor; scaling
    query or key states, which the paper names for fused kernels, is only an approximation. Its code takes column
    0, a pad under left padding. `gamma` as a learned tensor may be `[Hq]` or `[layers, Hq]`. Sliding-window layers
    are left alone: their window soon passes the initial token.
    """

    summary = "rescaled attention to the initial token, per head"
    paper = "https://arxiv.org/abs/2505.11739"
    compiles = True
    reads = "first"

    def __init__(self, config: ZeroTuningConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.gamma = self.given.get("gamma")
        self._by_layer = self.gamma is not None and self.gamma.dim() == 2
        self._columns: dict[tuple[int | None, torch.device], list[Columns]] = {}
        self._masses: dict[int, Tensor] = {}

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        return {"gamma": Learned((sizes.heads,), (sizes.layers, sizes.heads), ge=LEAST)}

    def pick(self, layers: list[int]) -> list[int]:
        total = max(layers, default=0) + 1
        return [n for n in layers if third_of(n, total) in self.config.thirds]

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        s, heads = self.config, query_heads(model)
        if heads is None:
            return
        if max(s.heads or [0]) >= heads:
            raise ConfigError(
                f"zerotuning: there is no head {max(s.heads or [0])}; the model has {heads} query heads."
            )
        if s.gammas is not None and len(s.gammas) != heads:
            raise ConfigError(
                f"zerotuning: there are factors for {len(s.gammas)} heads; the model has {heads} query heads."
            )

    def reweight(self, call: AttentionCall) -> list[Columns]:
        if call.layer not in self._masses and call.phase == "prefill" and call.Lq >= ENOUGH_TOKENS:
            with torch.no_grad():
                self._masses[call.layer] = initial_weight(call).mean()
        key = (call.layer if self._by_layer else None, call.q.device)
        if key not in self._columns:
            with torch.inference_mode(False):  # a later call may be one of training
                own = self._head_factors(call.layer, call.Hq)
                changes, factor = bool((own != 1).any()), own.to(call.q.device)
            self._columns[key] = [Columns(slice(0, 1), factor, positive=True)] if changes else []
        return self._columns[key]

    def _head_factors(self, layer: int, heads: int) -> Tensor:
        s = self.config
        if self.gamma is not None:
            return (self.gamma if self.gamma.dim() == 1 else self.gamma[layer]).float()
        if s.gammas is not None:
            return torch.tensor(s.gammas)
        factor = torch.full((heads,), float(s.gamma)) if s.heads is None else torch.ones(heads)
        factor[s.heads or []] = float(s.gamma)
        return factor

    @property
    def sink_mass(self) -> float | None:
        """Dense attention to the initial token, mean over the layers seen, their heads and later queries; or None."""
        return float(torch.stack(list(self._masses.values())).mean()) if self._masses else None

    def notes(self) -> list[str]:
        notes = []
        if self._columns and not any(self._columns.values()):
            notes.append("zerotuning: gamma is 1 for every head, which changes nothing; calibrate it or set it")
        if (mass := self.sink_mass) is not None and mass < NO_SINK:
            notes.append(
                f"zerotuning: the initial token gets {mass:.1%} of the attention, less than {NO_SINK:.0%}: this model "
                "has no attention sink there, so expect little from tuning it"
            )
        return notes
