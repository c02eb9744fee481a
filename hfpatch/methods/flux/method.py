"""Flux: each layer chooses full or sparse attention for each prompt, once."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.layers import parse_layers
from ...config.method_config import MethodConfig, option
from ...config.registry import get_method, make_config, register_method, resolve
from ...core.call import AttentionCall
from ...core.evicting import check_own_keys
from ...core.learned import Learned, ModelSizes
from ...core.method import Method, check_compatible
from ...core.selection import SinkWindow
from ...errors import ConfigError, IncompatibleMethodsError, UnsupportedModelError
from ...ops import attend
from ...runtime.model_sizes import check_given
from ..streaming import Streaming
from .router import FULL, Routers, pool_ends, router_shapes

_PAPER = {"sink": 128, "window": 2048}
ROUTERS = ("learned", "static", "entropy", "oracle")


@dataclass(kw_only=True)
class FluxConfig(MethodConfig):
    """Settings of `flux`."""

    method: ClassVar[str] = "flux"
    sparse: str = option("streaming", "method of the sparse branch; its decode side decides decode")
    sparse_settings: dict[str, Any] = option(
        {}, "settings of the sparse branch; for streaming the paper's sink 128, window 2048"
    )
    router: str = option(
        "static", "what decides: trained routers, a layer list, a ranking, both tried", choices=ROUTERS
    )
    sparse_layers: str | list[int] | None = option(None, "layers routed sparse by router='static'; none when None")
    sparsity: float = option(0.5, "share of layers routed sparse by router='entropy'", ge=0.0, le=1.0)
    pool: int = option(100, "tokens read at each end of the prompt by router='learned'", ge=1)
    tolerance: float = option(0.05, "relative output error router='oracle' accepts", ge=0.0)
    crop_cache: bool = option(
        False, "where all rows of a layer go to streaming, keep only the keys it can see; needs a DynamicCache"
    )

    def validate(self) -> None:
        self.sparse_settings = resolve(self.sparse)[0].renewed(self.sparse_settings)


@register_method
class Flux(Method[FluxConfig]):
    """Routes per layer and per row of the batch at the first call of a cache, and keeps to it.

    Flux Attention, arXiv 2604.07394. The learned router follows the code: queries before RoPE, mean over both ends
    of the prompt and over heads, argmax without noise at inference. Pads are never read: the reference ignores
    padding. With chunked prefill the first chunk decides, since its keys have been attended by then.
    `router="entropy"` ranks layers on calibration text (paper, appendix C); `"oracle"` runs both branches of every
    layer and is meant for tests.
    """

    summary = "routes whole layers to full or sparse attention, per prompt"
    paper = "https://arxiv.org/abs/2604.07394"
    reads = "positions"
    stateful = True

    def __init__(self, config: FluxConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        settings = {**(_PAPER if config.sparse == "streaming" else {}), **config.sparse_settings}
        child_config = make_config(config.sparse, settings)
        child_class = get_method(child_config.method)
        if "select" not in child_class.points() or "route" in child_class.points():
            raise IncompatibleMethodsError(
                f"flux cannot route to {config.sparse!r}; `sparse` needs a selecting method."
            )
        self.child = child_class(child_config)
        if self.child.retain is not None:
            raise ConfigError(
                f"flux: {config.sparse!r} drops keys for itself; have flux do it with its own crop_cache."
            )
        check_compatible([self, self.child])
        self.retain = self._retain if config.crop_cache else None
        self.keeps_first = isinstance(self.child, Streaming) and self.child.config.sink > 0
        if config.crop_cache and not self._sees_a_window():
            raise ConfigError(
                "flux: crop_cache=True goes with sparse='streaming' in both phases and question_tokens=0, which alone "
                "never looks back at dropped keys."
            )
        self.routers: Routers | None = None
        self.needs = self.child.needs | ({"q_pre_rope"} if config.router == "learned" else set())
        self.causality = "no" if config.router in ("learned", "oracle") else self.child.causality
        self._sparse_layers: set[int] = set()
        self.frequency: dict[int, Counter[str]] = defaultdict(Counter)
        self.last: dict[int, dict[int, bool]] = {}

    def _sees_a_window(self) -> bool:
        c = self.child
        return isinstance(c, Streaming) and c.config.phase == "both" and not c.config.question_tokens

    @property
    def executor(self) -> str | None:
        return self.config.executor or self.child.config.executor

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        takes = {"ranking": Learned((sizes.layers,))}
        shapes = router_shapes(sizes.query_dim)
        for n in range(sizes.layers):
            names = {f"layer.{n}.{name}": shape for name, shape in shapes.items()}
            takes |= {name: Learned(shape, along=tuple(names)) for name, shape in names.items()}
        return takes

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        check_given([self.child], model)
        self.child.prepare(model, layers)
        s = self.config
        if s.crop_cache:
            check_own_keys(model, self.name)
        if s.router == "learned":
            self.routers = self._load_routers(layers)
        elif s.router == "entropy":
            self._sparse_layers = self._ranked(layers)
        elif s.router == "static" and s.sparse_layers is not None:
            self._sparse_layers = set(parse_layers(s.sparse_layers, max(layers) + 1))

    def _load_routers(self, layers: Sequence[int]) -> Routers:
        named = {k: t for k, t in self.given.items() if k.startswith("layer.")}
        if not named:
            raise ConfigError(
                "flux: router='learned' needs trained routers; train them with `hfpatch calibrate flux` and load the "
                "result with PatchConfig.from_pretrained(folder), or use router='static'."
            )
        routers = Routers.from_tensors(named)
        missing = sorted(set(layers) - set(routers.layers))
        if missing:
            raise UnsupportedModelError(f"flux: the routers were trained for other layers; none for {missing}.")
        return routers

    def _ranked(self, layers: Sequence[int]) -> set[int]:
        scores = self.given.get("ranking")
        if scores is None:
            raise ConfigError(
                "flux: router='entropy' needs a ranking of this model's layers; `hfpatch calibrate flux`."
            )
        ranked, full = scores.tolist(), len(layers) - int(self.config.sparsity * len(layers))
        order = sorted(layers, key=lambda n: -ranked[n])
        return set(order[full:])

    def tensors(self) -> dict[str, Tensor]:
        return {**self.given, **(self.routers.state_dict() if self.routers else {})}

    def route(self, call: AttentionCall) -> list[Method | None]:
        key = "flux-sparse"
        if key not in call.state:
            call.state[key] = self._decide(call)
            self._count(call, call.state[key])
        phase = "decode" if call.phase == "decode" else "prefill"
        child = self.child if phase in self.child.acts_in else None
        return [child if s else None for s in call.state[key]]

    def _retain(self, call: AttentionCall) -> SinkWindow | None:
        """The only keys these rows will ever look at again."""
        sparse: list[bool] | None = call.state.get("flux-sparse")
        if sparse is None or not all(sparse) or not isinstance(self.child, Streaming):
            return None
        return SinkWindow(self.child.config.sink, self.child.config.window)

    @torch.no_grad()
    def _decide(self, call: AttentionCall) -> list[bool]:
        """Whether each row goes sparse in this layer."""
        if self.routers is not None:
            if call.q_pre_rope is None:
                raise UnsupportedModelError(f"flux: layer {call.layer} gave no queries before RoPE.")
            router = self.routers[call.layer].to(call.q.device)
            ways: list[int] = router(pool_ends(call.q_pre_rope, self.config.pool)).argmax(-1).tolist()
            return [way != FULL for way in ways]
        if self.config.router == "oracle":
            return self._try_both(call)
        return [call.layer in self._sparse_layers] * call.B

    def _try_both(self, call: AttentionCall) -> list[bool]:
        selection = self.child.select(call)
        common: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        full = attend(call.q, call.k, call.v, selection=None, **common).out.float()
        sparse = attend(call.q, call.k, call.v, selection=selection, **common).out.float()
        error = (sparse - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        close: list[bool] = (error <= self.config.tolerance).tolist()
        return close

    def _count(self, call: AttentionCall, chosen: list[bool]) -> None:
        self.frequency[call.layer].update("sparse" if s else "full" for s in chosen)
        self.last.setdefault(call.layer, {}).update(zip(call.rows, chosen, strict=True))

    def sparse_share(self) -> float:
        """Share of (layer, prompt) pairs routed sparse so far."""
        total = sum((c for c in self.frequency.values()), Counter[str]())
        return total["sparse"] / max(1, sum(total.values()))

    def notes(self) -> list[str]:
        if not self.frequency:
            return []
        per_layer = ", ".join(f"{n}: {c['sparse'] / sum(c.values()):.0%}" for n, c in sorted(self.frequency.items()))
        rows = sorted({r for layer in self.last.values() for r in layer})
        samples = "; ".join(
            f"row {r}: " + "".join("s" if self.last[n].get(r) else "F" for n in sorted(self.last)) for r in rows
        )
        return [
            f"flux routed {self.sparse_share():.0%} of layers to {self.config.sparse}; by layer {per_layer}",
            f"flux, last prompts, one letter per layer (s sparse, F full): {samples}",
        ]
