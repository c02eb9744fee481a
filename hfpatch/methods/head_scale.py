"""Constant factors on single attention heads; zero removes a head."""

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
from ..errors import ConfigError
from ..runtime.after_attention import refuse_unless_free
from ..runtime.model_facts import query_heads

MOST = 1e4


@dataclass(kw_only=True)
class HeadScaleConfig(MethodConfig):
    """Settings of `head_scale`."""

    method: ClassVar[str] = "head_scale"
    heads: list[list[int]] = option([], "[layer, query head] pairs to scale by `factor`")
    factor: float = option(0.0, "factor on the outputs of `heads`; 0 removes them", ge=-MOST, le=MOST)
    scales: list[list[float]] = option([], "[layer, query head, factor] triples, for factors of their own")

    def validate(self) -> None:
        if any(len(p) != 2 for p in self.heads) or any(len(t) != 3 for t in self.scales):
            raise ConfigError("head_scale: heads takes [layer, head] pairs, scales [layer, head, factor] triples.")
        entries: list[list[float]] = [*self.heads, *self.scales]  # type: ignore[list-item]
        if any(n != int(n) for p in entries for n in p[:2]):
            raise ConfigError("head_scale: layers and heads are whole numbers.")
        if any(abs(t[2]) > MOST for t in self.scales):
            raise ConfigError(f"head_scale: factors in scales must be {-MOST:g} to {MOST:g}.")
        places = [(int(p[0]), int(p[1])) for p in entries]
        if len(set(places)) < len(places):
            raise ConfigError("head_scale: a head is named twice.")
        if any(n < 0 for place in places for n in place):
            raise ConfigError("head_scale: layers and heads are numbers from 0 on.")

    def factors(self) -> dict[int, dict[int, float]]:
        """Layer -> head -> factor."""
        out: dict[int, dict[int, float]] = {}
        triples: list[list[float]] = [*([*p, self.factor] for p in self.heads), *self.scales]
        for layer, head, factor in triples:
            out.setdefault(int(layer), {})[int(head)] = float(factor)
        return out


@register_method
class HeadScale(Method[HeadScaleConfig]):
    """out_h -> c_h out_h before the output projection, for named heads of named layers.

    With factor 0 this is head ablation; Retrieval Heads (arXiv 2404.15574) are masked so, except that its code
    makes their attention uniform instead of removing the output. A learned tensor `scale [layers, Hq]` replaces
    the lists.
    """

    summary = "constant factor per head, 0 to ablate"
    paper = "https://arxiv.org/abs/2404.15574"
    compiles = True

    def __init__(self, config: HeadScaleConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.scale = self.given.get("scale")
        self._by_layer = config.factors()
        self._made: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        return {"scale": Learned((sizes.layers, sizes.heads), ge=-MOST, le=MOST)}

    def pick(self, layers: list[int]) -> list[int]:
        return layers if self.scale is not None else [n for n in layers if n in self._by_layer]

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        refuse_unless_free(model, layers, self.name, native_gate_ok=True)
        missing = sorted(set(self._by_layer) - set(layers)) if self.scale is None else []
        if missing:
            raise ConfigError(f"head_scale: heads of layer {missing[0]} are named, but that layer is not patched.")
        heads = query_heads(model)
        worst = max((h for n in layers for h in self._by_layer.get(n, {})), default=0)
        if heads is not None and worst >= heads:
            raise ConfigError(f"head_scale: there is no head {worst}; the model has {heads} query heads.")

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        key = (call.layer, out.device, out.dtype)
        if key not in self._made:
            with torch.inference_mode(False):  # a later call may be one of training
                self._made[key] = self._factors(call.layer, call.Hq, out.device).to(out.device, out.dtype)[:, None]
        return out * self._made[key]

    def _factors(self, layer: int, heads: int, device: torch.device) -> Tensor:
        if self.scale is not None:
            return self.scale[layer]
        factors = torch.ones(heads, device=device)
        for head, factor in self._by_layer[layer].items():
            factors[head : head + 1].fill_(factor)
        return factors
