"""patch_model, unpatch_model, patched, get_patch: the front door."""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .config.patch_config import PatchConfig
from .core.method import Method
from .errors import AlreadyPatchedError, NotPatchedError
from .handle import Handle
from .runtime.injection import attach, close_forwards, detach, open_forwards, runtime_of
from .runtime.pipeline import LayerRuntime
from .runtime.planning import MethodLike, PatchPlan, plan_methods, plan_patch
from .runtime.survey import AttentionLayer, survey

__all__ = ["Patch", "get_patch", "patch_model", "patched", "patched_with", "plan_patch", "unpatch_model"]

HANDLE = "_hfpatch_patch"
NO_SHARING = "layers share nothing: the text decoder takes no further keywords to carry it"
ModelT = TypeVar("ModelT", bound=nn.Module)
_lock = threading.RLock()
_handles: "weakref.WeakKeyDictionary[LayerRuntime, weakref.ref[Patch]]" = weakref.WeakKeyDictionary()


class Patch(Handle):
    """The handle of a patched model: report, config, save, undo; with `infiniretri`, reading as well."""

    def __init__(self, plan: PatchPlan, layers: list[tuple[AttentionLayer, LayerRuntime]]) -> None:
        super().__init__(plan, layers)
        self._below: Patch | None = None
        self._entered = False

    def unpatch(self) -> None:
        """Give the model back as it was. Raises NotPatchedError when it no longer carries this patch."""
        with _lock:
            if not self._attached:
                raise NotPatchedError("This patch has been undone already.")
            self._detach()

    @property
    def _attached(self) -> bool:
        return all(runtime_of(layer.module) is runtime for layer, runtime in self._plan)

    def _attach(self) -> None:
        """Patch the model, or leave it as it was when that is cut short. Raises AlreadyPatchedError."""
        taken = [layer.name for layer, _ in self._plan if runtime_of(layer.module) is not None]
        if taken:
            raise _already(f"{taken[0]} of the model")
        try:
            for layer, runtime in self._plan:
                attach(layer.module, runtime)
                _handles[runtime] = weakref.ref(self)
            if any("forward" in runtime.needs for _, runtime in self._plan):
                self._warnings = [] if open_forwards(self.plan.survey.root) else [NO_SHARING]
            vars(self._model)[HANDLE] = self
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        """Take the patch off, all of it, also when cut short."""
        try:
            self._take_off()
        except BaseException:
            self._take_off()
            raise

    def _take_off(self) -> None:
        for layer, _ in self._plan:
            detach(layer.module)
        close_forwards(self.plan.survey.root)
        if vars(self._model).get(HANDLE) is self:
            del vars(self._model)[HANDLE]


def patch_model(model: ModelT, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any) -> ModelT:
    """Change how the model attends, in place, and return it.

    `method`: a method or preset name with its settings, a config, or a list of these composed in order.
    Raises HfpatchError subclasses before anything is touched.
    """
    if isinstance(model, nn.Module) and any(runtime_of(m) is not None for m in model.modules()):
        raise _already("The model")
    patch = _prepared(plan_patch(model, method, **settings))
    with _lock:
        patch._attach()
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give the model back bit for bit as it was. Raises NotPatchedError."""
    with _lock:
        get_patch(model).unpatch()
    return model


def get_patch(model: nn.Module) -> Patch:
    """The handle of a patched model, whichever object around its layers was patched. Raises NotPatchedError."""
    with _lock:
        patch = _carried(model)
    if patch is None:
        raise NotPatchedError("The model carries no patch; call patch_model(model, ...) first.")
    return patch


@contextmanager
def patched(
    model: nn.Module, method: MethodLike | PatchConfig | Sequence[MethodLike], **settings: Any
) -> Iterator[Patch]:
    """Patch the model inside a `with` block; a patch it carried before is put aside and comes back."""
    with _in_place_of_any(model, _prepared(plan_patch(model, method, **settings))) as patch:
        yield patch


@contextmanager
def patched_with(model: nn.Module, methods: list[Method]) -> Iterator[Patch]:
    """As `patched`, with methods the caller made: for calibration, whose methods are no one's to load."""
    plan = plan_methods(model, PatchConfig([m.config for m in methods]), methods)
    with _in_place_of_any(model, _prepared(plan)) as patch:
        yield patch


def _prepared(plan: PatchPlan) -> Patch:
    plan.prepare()
    return Patch(plan, plan.runtimes())


@contextmanager
def _in_place_of_any(model: nn.Module, patch: Patch) -> Iterator[Patch]:
    try:
        with _lock:
            patch._below, patch._entered = _carried(model), True
            _exchange(patch._below, patch)
        yield patch
    finally:
        try:
            _leave(model, patch)
        except BaseException:
            _leave(model, patch)
            raise


def _exchange(old: Patch | None, new: Patch | None) -> None:
    """Put `new` in the place of `old`; `old` stays if that fails."""
    try:
        if old is not None:
            old._detach()
        if new is not None:
            new._attach()
    except BaseException:
        if old is not None and not old._attached:
            old._detach()
            old._attach()
        raise


def _leave(model: nn.Module, patch: Patch) -> None:
    """End the block of `patch`: what it covered comes back, unless a block entered later still covers it."""
    with _lock:
        top = above = _carried(model)
        if patch._entered and top is not patch._below:
            while above is not None and above is not patch and above._below is not patch:
                above = above._below
            if above is None or above is patch:
                _exchange(top, patch._below)
            else:
                above._below = patch._below
        patch._entered = False


def _carried(model: Any) -> Patch | None:
    """The patch on the model's layers; a handle made anew where they were patched through an object that is gone.

    Raises NotPatchedError where the model has only a part of the patched layers.
    """
    if not isinstance(model, nn.Module):
        return None
    own = vars(model).get(HANDLE)
    if isinstance(own, Patch) and own._attached:
        return own
    carried = {id(m): rt for m in model.modules() if (rt := runtime_of(m)) is not None}
    if not carried:
        return None
    first = next(iter(carried.values()))
    if len(carried) < first.patched:
        raise NotPatchedError(
            f"{len(carried)} of {first.patched} patched layers are in this {type(model).__name__}; call with the "
            "model they belong to."
        )
    known = _handles.get(first)
    handle = known() if known is not None else None
    return handle if handle is not None and handle._attached else _adopt(model, carried)


def _adopt(model: nn.Module, carried: dict[int, LayerRuntime]) -> Patch:
    found = survey(model)
    layers = [(x, carried[id(x.module)]) for x in found.layers if id(x.module) in carried]
    methods = list(dict.fromkeys(m for _, runtime in layers for m in runtime.methods))
    chosen = [rt.methods if (rt := carried.get(id(x.module))) else [] for x in found.layers]
    config, why = PatchConfig([m.config for m in methods]), ["not chosen"] * len(found.layers)
    return Patch(PatchPlan(model, config, methods, found, chosen, why), layers)


def _already(what: str) -> AlreadyPatchedError:
    return AlreadyPatchedError(
        f"{what} carries a patch already, perhaps put on through another object that shares its layers; call "
        "unpatch_model(model) first, pass a list to combine methods, or use `with patched(model, ...)` to replace the "
        "patch for a while."
    )
