"""patch_model, unpatch_model, patched, get_patch: the front door."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .call import Span
from .config import MethodConfig
from .errors import (
    AlreadyPatchedError,
    ConfigError,
    NothingPatchedError,
    NotPatchedError,
    UnsupportedModelError,
)
from .injection import AttentionLayer, Survey, attach, check_queries, detach, survey
from .layers import parse_layers
from .learned import check_given
from .method import Method, check_compatible
from .ops import list_executors
from .patch_config import PatchConfig
from .pipeline import LayerRuntime
from .registry import get_method, make_config
from .report import LayerLine, Report
from .values import shown

HANDLE = "_hfpatch_patch"
ModelT = TypeVar("ModelT", bound=nn.Module)
MethodLike = str | MethodConfig


class Patch:
    """The handle of a patched model: report, config, save, undo."""

    def __init__(
        self,
        model: nn.Module,
        config: PatchConfig,
        methods: list[Method],
        found: Survey,
        plan: list[tuple[AttentionLayer, LayerRuntime]],
        skipped: list[tuple[str, str]],
    ) -> None:
        self._model, self._config, self.methods = model, config, methods
        self._survey, self._plan, self._skipped = found, plan, skipped

    @property
    def config(self) -> PatchConfig:
        """What was patched, with the tensors the methods have learned."""
        tensors = {f"{n}.{k}": t for n, m in enumerate(self.methods) for k, t in m.tensors().items()}
        return PatchConfig(self._config.methods, self._config.base_model_name_or_path, tensors)

    @property
    def layers(self) -> list[int]:
        """Decoder layers that carry the patch."""
        return [layer.index for layer, _ in self._plan]

    def report(self) -> Report:
        """Calls, density, executors and fallbacks per layer and phase so far."""
        lines = [
            LayerLine(layer.index, layer.name, "+".join(m.name for m in rt.methods), phase, stats)
            for layer, rt in self._plan
            for phase, stats in sorted(rt.stats.items())
        ]
        notes = [note for m in self.methods for note in m.notes()]
        return Report(
            type(self._model).__name__, self._survey.num_layers, len(self._plan), lines, self._skipped, notes
        )

    def reset_report(self) -> None:
        """Set all counts to zero."""
        for _, runtime in self._plan:
            runtime.stats.clear()

    @contextmanager
    def spans(self, **places: Sequence[Span]) -> Iterator[None]:
        """Tell the methods where parts of the prompts lie: `with patch.spans(question=[(1900, 1950), None]): ...`.

        One `(start, stop)` per batch row, in tokens of the row without its padding, or None where a row has no such
        part. `dhsa` attends densely from the start of "question" on. Raises ConfigError.
        """
        for name, rows in places.items():
            if not rows or not all(p is None or (len(p) == 2 and 0 <= p[0] < p[1]) for p in rows):
                raise ConfigError(f"spans: {name} takes one (start, stop) per row, with 0 <= start < stop, or None.")
        before = [runtime.spans for _, runtime in self._plan]
        for _, runtime in self._plan:
            runtime.spans = {**runtime.spans, **places}
        try:
            yield
        finally:
            for (_, runtime), old in zip(self._plan, before, strict=True):
                runtime.spans = old

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the config and learned tensors into `folder`."""
        self.config.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the config and learned tensors to the Hub; returns the repository's address."""
        return self.config.push_to_hub(repo_id, **kwargs)

    def unpatch(self) -> None:
        """Give the model back as it was. Raises NotPatchedError when it no longer carries this patch."""
        if self._model.__dict__.get(HANDLE) is not self:
            raise NotPatchedError("This patch has been undone already.")
        self._detach()

    def _attach(self) -> None:
        for layer, runtime in self._plan:
            attach(layer.module, runtime)
        self._model.__dict__[HANDLE] = self

    def _detach(self) -> None:
        for layer, _ in self._plan:
            detach(layer.module)
        del self._model.__dict__[HANDLE]

    def __getattr__(self, name: str) -> Any:
        for method in self.__dict__.get("methods", ()):
            if name in method.drives:
                return partial(getattr(method, name), self._model)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        names = ", ".join(m.name for m in self.methods)
        return f"Patch({names}; {len(self._plan)} of {self._survey.num_layers} layers)"


def patch_model(model: ModelT, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any) -> ModelT:
    """Change how the model attends, in place, and return it.

    `method`: a method or preset name with its settings, a config, or a list of these composed in order.
    Raises HfpatchError subclasses before anything is touched.
    """
    if HANDLE in getattr(model, "__dict__", {}):
        raise AlreadyPatchedError(
            "The model carries a patch already; call unpatch_model(model) first, pass a list to combine methods, "
            "or use `with patched(model, ...)` to replace the patch for a while."
        )
    _prepare(model, method, settings)._attach()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give the model back bit for bit as it was. Raises NotPatchedError."""
    get_patch(model).unpatch()
    return model


def get_patch(model: nn.Module) -> Patch:
    """The handle of a patched model. Raises NotPatchedError."""
    patch = getattr(model, "__dict__", {}).get(HANDLE)
    if patch is None:
        raise NotPatchedError("The model carries no patch; call patch_model(model, ...) first.")
    return patch


@contextmanager
def patched(
    model: nn.Module, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any
) -> Iterator[Patch]:
    """Patch the model inside a `with` block; a patch it carried before is put aside and comes back."""
    with _in_place_of_any(model, _prepare(model, method, settings)) as patch:
        yield patch


@contextmanager
def patched_with(model: nn.Module, methods: list[Method]) -> Iterator[Patch]:
    """As `patched`, with methods the caller made: for calibration, whose methods are no one's to load."""
    with _in_place_of_any(model, _prepare_methods(model, PatchConfig([m.config for m in methods]), methods)) as patch:
        yield patch


@contextmanager
def _in_place_of_any(model: nn.Module, patch: Patch) -> Iterator[Patch]:
    before = model.__dict__.get(HANDLE)
    if before is not None:
        before._detach()
    patch._attach()
    try:
        yield patch
    finally:
        if model.__dict__.get(HANDLE) is not None:
            get_patch(model)._detach()
        if before is not None:
            before._attach()


def plan_patch(
    model: nn.Module, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any
) -> list[tuple[AttentionLayer, str]]:
    """What patching would do, without doing it: every attention layer with its methods or the reason for none."""
    found = survey(model)
    methods = _build(_as_config(method, settings))
    check_given(methods, model)
    chosen, why = _assign(methods, found)
    return [(x, "+".join(m.name for m in chosen[n]) or why[n]) for n, x in enumerate(found.layers)]


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


def _prepare(model: nn.Module, method: Any, settings: dict[str, Any]) -> Patch:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"Expected a loaded Transformers model, not {type(model).__name__}.")
    config = _as_config(method, settings)
    return _prepare_methods(model, config, _build(config))


def _prepare_methods(model: nn.Module, config: PatchConfig, methods: list[Method]) -> Patch:
    _check_executors(config)
    found = survey(model)
    check_given(methods, model)
    chosen, why = _assign(methods, found)
    for some in chosen:
        check_compatible(some)
    if not any(chosen):
        reasons = ", ".join(f"{n} x {r}" for r, n in Counter(why).items())
        raise NothingPatchedError(
            f"{'+'.join(m.name for m in methods)} would patch none of the {len(found.layers)} attention layers of "
            f"{type(model).__name__} ({reasons}); choose other `layers` or a method that acts on these."
        )
    for n, some in enumerate(chosen):
        if any("queries" in m.needs for m in some):
            check_queries(found.layers[n].module)
    for m in methods:
        m.prepare(model, [x.index for n, x in enumerate(found.layers) if m in chosen[n]])
    plan = [
        (x, LayerRuntime(x.name, x.index, found.num_layers, chosen[n]))
        for n, x in enumerate(found.layers)
        if chosen[n]
    ]
    skipped = found.skipped + [(x.name, why[n]) for n, x in enumerate(found.layers) if not chosen[n]]
    name = config.base_model_name_or_path or getattr(getattr(model, "config", None), "name_or_path", None) or None
    return Patch(model, PatchConfig(config.methods, name, config.tensors), methods, found, plan, skipped)
