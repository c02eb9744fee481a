"""Methods by name: one module per method in `hfpatch.methods`, others by `register_method` or entry points."""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .. import methods as builtin_package
from ..core.method import Method
from ..errors import ConfigError, UnknownMethodError
from ..values import shown
from .method_config import MethodConfig

ENTRY_POINT_GROUP = "hfpatch.methods"
_registered: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register_method(cls: M) -> M:
    """Class decorator that makes a method known by its config's `method` name."""
    name = getattr(cls.config_class, "method", "")
    if not name:
        raise ConfigError(f"{cls.__name__}: its config class needs a `method` name.")
    other = _registered.get(name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"The method name {name!r} is already taken by {other.__module__}.{other.__qualname__}.")
    _registered[name] = cls
    return cls


@cache
def _builtin_names() -> frozenset[str]:
    return frozenset(m.name for m in pkgutil.iter_modules(builtin_package.__path__) if not m.name.startswith("_"))


def _entry_points() -> dict[str, Any]:
    return {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}


def _import_all() -> None:
    for name in _builtin_names():
        importlib.import_module(f"{builtin_package.__name__}.{name}")
    for name, entry in _entry_points().items():
        if name not in _registered:
            register_method(entry.load())


def list_methods() -> list[str]:
    """Names of all methods, sorted; presets not included."""
    _import_all()
    return sorted(_registered)


def list_presets() -> dict[str, tuple[str, dict[str, Any]]]:
    """Preset name -> (method name, settings)."""
    _import_all()
    return {p: (n, dict(s)) for n, cls in sorted(_registered.items()) for p, s in cls.presets.items()}


def get_method(name: str) -> type[Method]:
    """The method class registered under `name`. Raises UnknownMethodError with near names."""
    if not isinstance(name, str):
        raise UnknownMethodError(shown(name), [*list_methods(), *list_presets()])
    if name not in _registered:
        if name in _builtin_names():
            importlib.import_module(f"{builtin_package.__name__}.{name}")
        elif name in (entries := _entry_points()):
            register_method(entries[name].load())
    if name not in _registered:
        raise UnknownMethodError(name, [*list_methods(), *list_presets()])
    return _registered[name]


def resolve(name: str) -> tuple[type[MethodConfig], dict[str, Any]]:
    """The config class of a method or preset, and the preset's settings. Raises UnknownMethodError."""
    known = not isinstance(name, str) or name in _registered or name in _builtin_names()
    preset: dict[str, Any] = {}
    if not known and name in (presets := list_presets()):
        name, preset = presets[name]
    return get_method(name).config_class, preset


def make_config(name: str, settings: dict[str, Any]) -> MethodConfig:
    """Config of a method or preset with `settings` applied. Raises ConfigError, UnknownMethodError."""
    cls, preset = resolve(name)
    return cls.from_dict({**preset, **cls.renewed(settings)} if preset else settings)
