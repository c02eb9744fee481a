"""What patching a model would do: its methods, the layers each takes, and why others are left alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config.layers import parse_layers
from ..config.method_config import MethodConfig
from ..config.patch_config import PatchConfig
from ..config.registry import get_method, make_config
from ..core.method import Method, check_compatible
from ..errors import ConfigError, NothingPatchedError, UnsupportedModelError
from ..ops import list_executors
from ..values import shown
from .injection import check_queries
from .model_sizes import check_given
from .pipeline import LayerRuntime
from .survey import AttentionLayer, Survey, survey

MethodLike = str | MethodConfig


@dataclass(frozen=True)
class PatchPlan(Sequence[tuple[AttentionLayer, str]]):
    """What patching a model would do: every attention layer with its methods, or the reason for none.

    `chosen` are the methods of each layer of the survey, `why` the reasons.
    """

    model: nn.Module
    config: PatchConfig
    methods: list[Method]
    survey: Survey
    chosen: list[list[Method]]
    why: list[str]

    def __len__(self) -> int:
        return len(self.survey.layers)

    def __getitem__(self, n: Any) -> Any:
        if isinstance(n, slice):
            return [self[i] for i in range(*n.indices(len(self)))]
        return self.survey.layers[n], "+".join(m.name for m in self.chosen[n]) or self.why[n]

    @property
    def patched(self) -> list[tuple[AttentionLayer, list[Method]]]:
        """The layers that methods act on."""
        return [(layer, some) for layer, some in zip(self.survey.layers, self.chosen, strict=True) if some]

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Names of the attention modules that are left alone, with the reason."""
        left = zip(self.survey.layers, self.chosen, self.why, strict=True)
        return self.survey.skipped + [(layer.name, why) for layer, some, why in left if not some]

    def prepare(self) -> None:
        """Have the methods look at the model. Raises HfpatchError subclasses where the patch cannot be."""
        for _, some in self.patched:
            check_compatible(some)
        if not self.patched:
            reasons = ", ".join(f"{n} x {r}" for r, n in Counter(self.why).items())
            raise NothingPatchedError(
                f"{'+'.join(m.name for m in self.methods)} would patch none of the {len(self)} attention layers of "
                f"{type(self.model).__name__} ({reasons}); choose other `layers` or a method that acts on these."
            )
        for layer, some in self.patched:
            if any("q_pre_rope" in m.needs for m in some):
                check_queries(layer.module)
        for m in self.methods:
            m.prepare(self.model, [layer.index for layer, some in self.patched if m in some])

    def runtimes(self) -> list[tuple[AttentionLayer, LayerRuntime]]:
        """What the patched layers are to carry."""
        count, own = self.survey.num_layers, getattr(self.model, "config", None)
        made = [(x, LayerRuntime(x.name, x.index, count, some, own)) for x, some in self.patched]
        for _, runtime in made:
            runtime.patched = len(made)
        return made


def plan_patch(
    model: nn.Module, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any
) -> PatchPlan:
    """What patching would do, without doing it: pairs of an attention layer and its methods or the reason for none."""
    config = _as_config(method, settings)
    return plan_methods(checked(model), config, _build(config))


def plan_methods(model: nn.Module, config: PatchConfig, methods: list[Method]) -> PatchPlan:
    """As `plan_patch`, for methods that have been made already."""
    _check_executors(config)
    found = survey(model)
    check_given(methods, model)
    chosen, why = _assign(methods, found)
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", None) or None
    return PatchPlan(model, PatchConfig(config.methods, name, config.tensors), methods, found, chosen, why)


def checked(model: Any) -> nn.Module:
    """The model, if it is a loaded one. Raises UnsupportedModelError."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(f"Expected a loaded Transformers model, not {what}.")
    return model


def _as_config(method: Any, settings: dict[str, Any]) -> PatchConfig:
    if isinstance(method, str):
        return PatchConfig([make_config(method, settings)])
    if settings:
        raise ConfigError(
            f"Settings ({', '.join(settings)}) go with a method's name; put them into the config instead."
        )
    if isinstance(method, PatchConfig):
        return method
    if isinstance(method, MethodConfig):
        return PatchConfig([method])
    if isinstance(method, (list, tuple)) and method:
        configs = [make_config(m, {}) if isinstance(m, str) else m for m in method]
        if all(isinstance(c, MethodConfig) for c in configs):
            return PatchConfig(configs)
    raise ConfigError(f"patch_model takes a method name, a config or a non-empty list of these, not {shown(method)}.")


def _build(config: PatchConfig) -> list[Method]:
    return [get_method(c.method)(c, own) for c, own in zip(config.methods, config.tensors_by_method(), strict=True)]


def _assign(methods: list[Method], found: Survey) -> tuple[list[list[Method]], list[str]]:
    """Methods per attention layer, and for layers without any the reason."""
    chosen: list[list[Method]] = [[] for _ in found.layers]
    why = ["not chosen"] * len(found.layers)
    for method in methods:
        wanted = set(parse_layers(method.config.layers, found.num_layers))
        picked = set(method.pick([x.index for x in found.layers if x.index in wanted and x.kind in method.kinds]))
        for n, layer in enumerate(found.layers):
            if layer.index in picked and layer.kind in method.kinds:
                chosen[n].append(method)
            elif layer.index in wanted:
                left = layer.kind not in method.kinds
                why[n] = f"{layer.kind} attention" if left else f"left dense by {method.name}"
    return chosen, why


def _check_executors(config: PatchConfig) -> None:
    known = [e.name for e in list_executors()]
    for c in config.methods:
        if c.executor is not None and c.executor not in known:
            raise ConfigError(f"{c.method}: executor={shown(c.executor)} is not one of {', '.join(map(repr, known))}.")
