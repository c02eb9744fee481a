"""Settings and their files: what is refused, how it is said, and what survives a round trip."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import Tensor

import hfpatch
from hfpatch import ConfigError, Method, MethodConfig, PatchConfig, UnknownMethodError, get_method, patched
from hfpatch.config import registry
from hfpatch.config.method_config import option
from hfpatch.config.patch_config import CONFIG_FILE, TENSOR_FILE

BUILTIN = sorted(registry._builtin_names())
NEWER = "999.0.0"


@dataclass(kw_only=True)
class ToyConfig(MethodConfig):
    method: ClassVar[str] = "toy-config"
    count: int = option(3, "at least one", ge=1)
    share: float = option(0.5, "a share", gt=0, le=1)
    mode: str = option("a", "a or b", choices=("a", "b"))
    flag: bool = option(False, "yes or no")
    names: list[str] = option([], "names")
    maybe: float | None = option(None, "a number or nothing")

    def validate(self) -> None:
        if self.flag and self.mode == "b":
            raise ConfigError(f"{self.method}: flag=True does not go with mode='b'.")


class ToyMethod(Method):
    """Learns one tensor."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig, tensors: Any = None) -> None:
        super().__init__(config, tensors)
        self.learned = dict(tensors or {"gate.weight": torch.arange(6.0).view(2, 3).T})

    def tensors(self) -> dict[str, Tensor]:
        return self.learned


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry._registered, "toy-config", ToyMethod)
    yield


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(f"hfpatch.{n}") for n in ("config", "patch_config")]
    for x in loggers:
        x.addHandler(handler)
    yield seen
    for x in loggers:
        x.removeHandler(handler)


RANGES = [
    ({"count": 0}, "count=0", ">= 1"),
    ({"share": 0.0}, "share=0.0", "> 0"),
    ({"share": 1.5}, "share=1.5", "<= 1"),
    ({"share": float("nan")}, "share=nan", "> 0"),
    ({"mode": "c"}, "mode='c'", "'a', 'b'"),
]
TYPES = [
    ({"count": "3"}, "count='3'", "int"),
    ({"count": 3.0}, "count=3.0", "int"),
    ({"count": True}, "count=True", "int"),
    ({"count": None}, "count=None", "int"),
    ({"share": "x"}, "share='x'", "float"),
    ({"share": False}, "share=False", "float"),
    ({"flag": 1}, "flag=1", "bool"),
    ({"names": "ab"}, "names='ab'", "list[str]"),
    ({"names": [1]}, "names=[1]", "list[str]"),
    ({"maybe": "1"}, "maybe='1'", "float | None"),
    ({"executor": 3}, "executor=3", "str | None"),
]


@pytest.mark.parametrize("settings,field,allowed", RANGES + TYPES)
def test_bad_values_name_field_value_and_range(settings: dict[str, Any], field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        ToyConfig(**settings)
    text = str(error.value)
    assert text.startswith(f"toy-config: {field}") and allowed in text and text.endswith(".")


def test_good_values_pass() -> None:
    config = ToyConfig(count=1, share=1, mode="b", names=["x"], maybe=2)
    assert (config.count, config.share, config.maybe) == (1, 1, 2)
    assert ToyConfig().names == [] and ToyConfig().names is not ToyConfig().names
    with pytest.raises(ConfigError, match="flag=True does not go with"):
        ToyConfig(flag=True, mode="b")


def bounded() -> list[Any]:
    """Every setting of every built-in method that has a bound or choices, with a value just outside."""
    out = []
    for name in BUILTIN:
        cls = get_method(name).config_class
        for f in dataclasses.fields(cls):
            meta = f.metadata
            if meta.get("ge") is not None:
                out.append(pytest.param(name, f.name, meta["ge"] - 1, f">= {meta['ge']}"))
            if meta.get("gt") is not None:
                out.append(pytest.param(name, f.name, meta["gt"], f"> {meta['gt']}"))
            if meta.get("le") is not None:
                out.append(pytest.param(name, f.name, meta["le"] + 1, f"<= {meta['le']}"))
            if meta.get("choices"):
                out.append(pytest.param(name, f.name, "no such choice", "is not one of|wrong type"))
    return out


@pytest.mark.parametrize("name,field,value,allowed", bounded())
def test_every_bound_of_every_method_is_held(name: str, field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: {field}={value!r}.*({allowed})"):
        get_method(name).config_class(**{field: value})


@pytest.mark.parametrize("name", BUILTIN)
def test_every_setting_is_documented(name: str) -> None:
    for f in dataclasses.fields(get_method(name).config_class):
        assert f.metadata.get("help"), f.name


@pytest.mark.parametrize("name", BUILTIN)
def test_defaults_of_every_method_survive_json(name: str, tmp_path: Path) -> None:
    config = PatchConfig([get_method(name).config_class(layers="1-")], "some/model")
    assert PatchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG_FILE]
    for path in (tmp_path, str(tmp_path), tmp_path / CONFIG_FILE):
        assert PatchConfig.from_pretrained(path) == config


def test_unknown_settings_raise_and_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"there is no setting 'windwo'.*window"):
        PatchConfig.from_dict({"methods": [{"method": "streaming", "windwo": 3}]})
    with pytest.raises(ConfigError, match="'windwo'"), patched(zoo.SUPPORTED["llama"].build(), "streaming", windwo=3):
        pass
    with pytest.raises(ConfigError, match="there is no setting 'extra'"):
        PatchConfig.from_dict({"methods": [{"method": "streaming"}], "extra": 1})


def test_a_file_of_a_newer_version_warns_instead(warnings: list[str]) -> None:
    data = {"hfpatch_version": NEWER, "methods": [{"method": "streaming", "window": 9, "new": 3}], "also": 1}
    config = PatchConfig.from_dict(data)
    assert config.methods == [get_method("streaming").config_class(window=9)]
    assert any("new" in w and "streaming" in w for w in warnings) and any("also" in w for w in warnings)
    data["methods"][0]["window"] = 0  # type: ignore[index]
    with pytest.raises(ConfigError, match="window=0"):
        PatchConfig.from_dict(data)


def test_unknown_methods_come_with_near_names(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('{"methods": [{"method": "streming"}]}')
    with pytest.raises(UnknownMethodError, match="did you mean 'streaming'"):
        PatchConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_and_a_name_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"holds no {CONFIG_FILE}"):
        PatchConfig.from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "a/b/c", str(tmp_path / "missing")):
        with pytest.raises(ConfigError, match="neither a folder, a JSON file nor a reachable Hub repository"):
            PatchConfig.from_pretrained(name)


def test_tensors_survive_files_and_reach_their_method(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    own = {"gate.weight": torch.randn(2, 3), "bias": torch.randn(4).bfloat16()}
    config = PatchConfig([ToyConfig(count=2), get_method("dense").config_class(), ToyConfig(count=5)])
    config.tensors = {f"2.{k}": t for k, t in own.items()}
    with patched(model, config) as patch:
        assert torch.equal(patch.methods[0].tensors()["gate.weight"], torch.arange(6.0).view(2, 3).T)
        assert all(torch.equal(patch.methods[2].tensors()[k], t) for k, t in own.items())
        patch.save_pretrained(tmp_path / "deep" / "er")
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    again = PatchConfig.from_pretrained(tmp_path / "deep" / "er")
    assert set(again.tensors) == {"0.gate.weight", "2.gate.weight", "2.bias"}
    assert [m.count for m in again.methods if isinstance(m, ToyConfig)] == [2, 5]
    with patched(model, again) as patch:
        assert all(torch.equal(patch.methods[2].tensors()[k], t) for k, t in own.items())
        assert torch.equal(patch.methods[0].tensors()["gate.weight"], torch.arange(6.0).view(2, 3).T)


def test_the_file_says_version_and_model(tmp_path: Path) -> None:
    model = zoo.SUPPORTED["llama"].build()
    model.config.name_or_path = "some/model"
    with patched(model, "streaming", window=7) as patch:
        patch.save_pretrained(tmp_path)
    data = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert data["hfpatch_version"] == hfpatch.__version__ and data["base_model_name_or_path"] == "some/model"
    assert data["methods"][0]["method"] == "streaming" and data["methods"][0]["window"] == 7


@pytest.mark.parametrize("thing", [3, [], ["streaming", 3], None, {"method": "streaming"}, [[]]])
def test_patch_model_says_what_it_takes(thing: Any) -> None:
    with pytest.raises(ConfigError, match="method name, a config or a non-empty list"):
        hfpatch.patch_model(zoo.SUPPORTED["llama"].build(num_hidden_layers=1), thing)


def test_settings_belong_to_a_name() -> None:
    model = zoo.SUPPORTED["llama"].build(num_hidden_layers=1)
    with pytest.raises(ConfigError, match="put them into the config"):
        hfpatch.patch_model(model, get_method("streaming").config_class(), window=3)


@pytest.mark.parametrize("tensors", [{}, {"0.x": torch.ones(1)}])
def test_push_to_hub_leaves_no_old_tensors(tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: "url")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *a, **k: seen.update(k))
    PatchConfig([ToyConfig()], None, tensors).push_to_hub("me/patch")
    assert seen.get("delete_patterns") == (None if tensors else TENSOR_FILE)


@pytest.mark.parametrize("repo", [None, 5, "a b", "a/b/c"])
def test_push_to_hub_says_why_it_cannot(repo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(hfpatch.HfpatchError) as error:
        PatchConfig([ToyConfig()]).push_to_hub(repo)
    assert "\n" not in str(error.value)


def test_push_to_hub_uploads_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class FakeApi:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, repo_id: str, **kwargs: Any) -> str:
            seen.update(repo=repo_id, **kwargs)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            seen["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    with patched(zoo.SUPPORTED["llama"].build(num_hidden_layers=1), "toy-config") as patch:
        assert patch.push_to_hub("me/patch", private=True) == "https://hub/me/patch"
    assert seen == {"repo": "me/patch", "private": True, "exist_ok": True, "files": [CONFIG_FILE, TENSOR_FILE]}
