"""Methods by name: built-in, registered, from entry points, presets, and wrong names."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import zoo

from hfpatch import (
    ConfigError,
    Method,
    MethodConfig,
    UnknownMethodError,
    get_method,
    list_methods,
    patched,
    register_method,
)
from hfpatch.config import registry


@dataclass(kw_only=True)
class OneConfig(MethodConfig):
    method: ClassVar[str] = "toy-one"


class One(Method):
    config_class = OneConfig


class Other(Method):
    config_class = OneConfig


class Nameless(Method):
    pass


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    list_methods()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


def test_builtin_methods_are_files_named_after_them() -> None:
    names = registry._builtin_names()
    assert {"dense", "streaming"} <= names <= set(list_methods())
    for name in names:
        cls = get_method(name)
        assert cls.config_class.method == name
        assert cls.__module__ in (f"hfpatch.methods.{name}", f"hfpatch.methods.{name}.method")
        assert cls.summary and cls.__doc__ and cls.config_class.__doc__
    assert list_methods() == sorted(list_methods())


def test_register_and_register_again() -> None:
    assert register_method(One) is One
    assert get_method("toy-one") is One and "toy-one" in list_methods()
    assert register_method(One) is One
    with pytest.raises(ConfigError, match=r"'toy-one' is already taken by test_registry\.One"):
        register_method(Other)
    with pytest.raises(ConfigError, match="Nameless: its config class needs a `method` name"):
        register_method(Nameless)


@pytest.mark.parametrize(
    "name,near", [("streeming", "'streaming'"), ("tri-shap", "'tri-shape'"), ("Dense", "'dense'")]
)
def test_near_names(name: str, near: str) -> None:
    with pytest.raises(UnknownMethodError, match=f"{name!r}; did you mean .*{near}"):
        get_method(name)


def test_far_names_list_what_there_is() -> None:
    with pytest.raises(UnknownMethodError, match=r"known methods: .*dense.*streaming"):
        get_method("zzzzqqq")


@pytest.mark.parametrize("name", ["", "__init__", "../dense", "dense.py", "os"])
def test_names_that_are_no_methods(name: str) -> None:
    with pytest.raises(UnknownMethodError):
        get_method(name)


def test_presets_are_settings_of_a_method_and_may_be_changed() -> None:
    assert registry.list_presets()["tri-shape"][0] == "streaming"
    config: Any = registry.make_config("tri-shape", {"window": 64})
    assert (config.method, config.sink, config.window, config.question_tokens) == ("streaming", 128, 64, 128)
    for preset, (method, settings) in registry.list_presets().items():
        assert registry.make_config(preset, {}) == get_method(method).config_class(**settings)
        assert preset not in list_methods()


def test_entry_points_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def load() -> type[Method]:
        loads.append("toy-one")
        return One

    monkeypatch.setattr(registry, "_entry_points", lambda: {"toy-one": SimpleNamespace(name="toy-one", load=load)})
    get_method("dense")
    assert not loads
    with patched(zoo.SUPPORTED["llama"].build(num_hidden_layers=1), "toy-one") as patch:
        assert isinstance(patch.methods[0], One) and loads == ["toy-one"]
    assert "toy-one" in list_methods() and loads == ["toy-one"]


def test_a_method_that_overrides_nothing_is_dense() -> None:
    register_method(One)
    assert One.points() == frozenset()
    model = zoo.SUPPORTED["llama"].build(num_hidden_layers=1)
    with patched(model, "toy-one") as patch:
        model(zoo.prompt(model, 1, 9))
        assert patch.report().density() == 1.0 and not patch.report().fallbacks()
