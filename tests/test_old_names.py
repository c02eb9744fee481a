"""Settings under the names of earlier versions: taken however they are given, with one warning."""

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo
from hfpatch.evals.recipe.build import build_run
from hfpatch.evals.recipe.recipe import find_recipe, list_recipes, load_recipe
from hfpatch.evals.run.variants import parse_settings, parse_variants
from methods_list import METHODS, MethodCase

from hfpatch import ConfigError, PatchConfig, get_method, list_methods, patched
from hfpatch.config.old_names import old_names
from hfpatch.config.patch_config import CONFIG_FILE
from hfpatch.config.registry import list_presets, make_config
from hfpatch.methods.flux import FluxConfig

RENAMED = {
    "block_topk": {"mass": "top_p", "sink": "sink_blocks", "window": "window_blocks", "share": "head_sharing"},
    "flash_prefill": {"sink": "sink_blocks", "window": "window_blocks", "share": "head_sharing"},
    "xattention": {"mass": "top_p", "sink": "sink_blocks", "window": "window_blocks", "share": "head_sharing"},
    "skip_softmax": {"share": "head_sharing"},
    "vertical_slash": {"share": "head_sharing"},
    "quest": {"share": "head_sharing"},
    "sampled": {"share": "head_sharing"},  # as every block method, whose settings it shares
    "streaming": {"last_queries": "question_tokens"},
    "pattern": {"sink": "sink_blocks", "window": "window_blocks", "share": "head_sharing"},
    "dhsa": {
        "window": "boundary_window", "heads": "head_sharing", "share": "layer_sharing",
        "share_span": "layer_sharing_span",
    },
}  # fmt: skip
VALUES = {
    "top_p": 0.5,
    "sink_blocks": 3,
    "window_blocks": 7,
    "boundary_window": 7,
    "layer_sharing_span": 2,
    "question_tokens": 5,
}
CASES = [(name, old, new) for name, names in RENAMED.items() for old, new in names.items()]


def value_of(name: str, new: str) -> Any:
    """A value of a setting that is not its default."""
    field = next(f for f in dataclasses.fields(get_method(name).config_class) if f.name == new)
    others = [c for c in field.metadata["choices"] or () if c != field.default]
    return others[-1] if others else VALUES[new]


def from_file(name: str, settings: dict[str, Any], folder: Path) -> Any:
    data = {"hfpatch_version": "0.1.0", "methods": [{"method": name, **settings}]}
    (folder / CONFIG_FILE).write_text(json.dumps(data))
    return PatchConfig.from_pretrained(folder).methods[0]


def from_command_s_file(name: str, settings: dict[str, Any], folder: Path) -> Any:
    data = {"hfpatch_version": "0.1.0", "methods": [{"method": name, **settings}]}
    (folder / CONFIG_FILE).write_text(json.dumps(data))
    return only(parse_variants([str(folder)]))


def from_model(name: str, settings: dict[str, Any], folder: Path) -> Any:
    with patched(zoo.SUPPORTED["llama"].build(), name, **settings) as patch:
        patch.save_pretrained(folder)
        return patch.config.methods[0]


def set_later(name: str, settings: dict[str, Any], folder: Path) -> Any:
    config = get_method(name).config_class()
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def from_recipe(name: str, settings: dict[str, Any], folder: Path, variant: dict[str, Any]) -> Any:
    file = folder / "recipe.yaml"
    file.write_text(
        json.dumps({"model": "embedded", "variants": [variant], "tasks": [{"task": "niah", "lengths": [64]}]})
    )
    return only(build_run(load_recipe(file)).variants)


def only(variants: list[Any]) -> Any:
    return variants[-1].config.methods[0]


def inline(settings: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in settings.items())


WAYS: dict[str, Callable[[str, dict[str, Any], Path], Any]] = {
    "constructor": lambda name, s, folder: get_method(name).config_class(**s),
    "set later": set_later,
    "from_dict": lambda name, s, folder: get_method(name).config_class.from_dict(s),
    "make_config": lambda name, s, folder: make_config(name, s),
    "patch_model": from_model,
    "saved file": from_file,
    "saved file for a command": from_command_s_file,
    "--patch": lambda name, s, folder: only(parse_variants([f"{name}:{inline(s)}"])),
    "--set": lambda name, s, folder: only(parse_variants([name], parse_settings([inline(s)]))),
    "--patch-args": lambda name, s, folder: only(parse_variants([name], parse_settings([], json.dumps(s)))),
    "recipe": lambda name, s, folder: from_recipe(name, s, folder, {"patch": name, "settings": s}),
    "recipe, inline": lambda name, s, folder: from_recipe(name, s, folder, {"patch": f"{name}:{inline(s)}"}),
    "recipe, methods": lambda name, s, folder: from_recipe(name, s, folder, {"methods": [{"method": name, **s}]}),
}


def told(made: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = made()
    return out, [str(w.message) for w in seen if w.category is DeprecationWarning and "is now" in str(w.message)]


def test_the_table_holds_every_renamed_setting() -> None:
    found = {n: old_names(get_method(n).config_class) for n in list_methods()}
    assert {n: names for n, names in found.items() if names} == RENAMED


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name,old,new", CASES)
def test_an_old_name_is_taken_with_one_warning(name: str, old: str, new: str, way: str, tmp_path: Path) -> None:
    value = value_of(name, new)
    config, said = told(lambda: WAYS[way](name, {old: value}, tmp_path))
    assert len(said) == 1 and said[0].startswith(f"{name}: ") and f"{old} is now {new}" in said[0]
    assert getattr(config, new) == value and old not in vars(config)
    assert config.to_dict()[new] == value and old not in config.to_dict()
    same, nothing = told(lambda: WAYS[way](name, {new: value}, tmp_path))
    assert same == config and not nothing


@pytest.mark.parametrize("way", [w for w in WAYS if w not in ("set later", "--set")])
@pytest.mark.parametrize("name,old,new", CASES)
def test_both_names_at_once_are_refused(name: str, old: str, new: str, way: str, tmp_path: Path) -> None:
    value = value_of(name, new)
    with pytest.raises(Exception, match=f"{old} is the earlier name of {new}, which is given too"):
        WAYS[way](name, {old: value, new: value}, tmp_path)


def test_a_preset_is_overruled_by_an_old_name() -> None:
    config, said = told(lambda: make_config("prism", {"mass": 0.5, "share": "all"}))
    assert config == make_config("prism", {"top_p": 0.5, "head_sharing": "all"})
    assert said == ["block_topk: the setting mass is now top_p, share is now head_sharing."]


def test_settings_of_flux_s_sparse_branch(tmp_path: Path) -> None:
    config, said = told(lambda: FluxConfig(sparse="prism", sparse_settings={"mass": 0.5}))
    assert config.sparse_settings == {"top_p": 0.5} and len(said) == 1
    with patched(zoo.SUPPORTED["llama"].build(), config) as patch:
        patch.save_pretrained(tmp_path)
    assert "mass" not in (tmp_path / CONFIG_FILE).read_text()


def test_saved_files_hold_new_names(tmp_path: Path) -> None:
    from_model("block_topk", {"mass": 0.5}, tmp_path)
    saved = json.loads((tmp_path / CONFIG_FILE).read_text())["methods"][0]
    assert saved["top_p"] == 0.5 and not {"mass", "sink", "window", "share"} & saved.keys()


def test_what_is_shipped_gives_no_warning() -> None:
    for name in [*list_methods(), *list_presets()]:
        assert told(lambda n=name: make_config(n, {}))[1] == []
    embedded = Path(inspect.getfile(get_method("dhsa"))).parent / "embedded"
    assert told(lambda: PatchConfig.from_pretrained(embedded))[1] == []
    for recipe in list_recipes():
        assert told(lambda r=recipe: build_run(load_recipe(find_recipe(r))))[1] == []


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(DeprecationWarning, match="mass is now top_p") as seen:
        make_config("xattention", {"mass": 0.5})
    assert seen[0].filename == __file__


def test_errors_name_new_settings_only() -> None:
    with pytest.raises(ConfigError, match="there is no setting 'masss'") as error:
        make_config("xattention", {"masss": 0.5})
    assert "top_p" in str(error.value) and " mass," not in str(error.value)
    with pytest.raises(ConfigError, match="No patch has a setting 'masss'") as error:
        parse_variants(["xattention"], {"masss": 1})
    assert " mass," not in str(error.value)


def test_the_signature_is_the_constructor_s() -> None:
    names = inspect.signature(get_method("xattention").config_class).parameters
    assert "top_p" in names and "mass" not in names and "settings" not in names


SAVED = json.loads((Path(__file__).parent / "saved_by_0_1_0.json").read_text())
"""Files that 0.1.0 wrote for the settings of the list, by the names of its cases."""


@pytest.mark.parametrize("case", [c for c in METHODS if str(c) in SAVED], ids=str)
def test_what_the_last_version_saved_loads_as_the_same_settings(case: MethodCase, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(SAVED[str(case)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = PatchConfig.from_pretrained(tmp_path).methods
    assert loaded == [make_config(case.name, case.settings)]


def test_files_of_the_last_version_cover_the_list() -> None:
    later = {"gated", "sampled", "sampled-question", "dhsa-queries"}
    assert {str(case) for case in METHODS} - later == set(SAVED)
