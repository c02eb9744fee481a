"""What settings may hold: finite numbers a tensor can take, plain lists, text; converted where nothing is lost."""

import dataclasses
import json
import math
import os
import typing
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from test_invariants import tree

from hfpatch import ConfigError, HfpatchError, PatchConfig, get_method, patch_model, patched
from hfpatch.config import registry
from hfpatch.config.registry import make_config
from hfpatch.methods.act import ACTConfig
from hfpatch.methods.flux import FluxConfig
from hfpatch.methods.gated.method import GatedConfig
from hfpatch.methods.head_scale import HeadScaleConfig
from hfpatch.methods.streaming import StreamingConfig
from hfpatch.methods.zerotuning import ZeroTuningConfig

BUILTIN = sorted(registry._builtin_names())


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def ring() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


WRONG: dict[str, Any] = {
    "no repr": Odd, "ring": ring, "set": lambda: {1}, "generator": lambda: (n for n in [1]), "bytes": lambda: b"1",
    "tensor": lambda: torch.tensor(1), "array": lambda: np.array([1]), "object": object, "class": lambda: int,
    "decimal": lambda: Decimal(1), "complex": lambda: 1j, "dict of numbers": lambda: {1: 2},
}  # fmt: skip


EVERY = [(name, f.name) for name in BUILTIN for f in dataclasses.fields(get_method(name).config_class)]


def types_of(name: str, field: str) -> set[Any]:
    """The types a setting takes."""
    hint = typing.get_type_hints(get_method(name).config_class)[field]
    return {hint, *(() if typing.get_origin(hint) is list else typing.get_args(hint))}


def fields_of(*hints: Any) -> list[tuple[str, str]]:
    """(method, field) of every setting that takes one of these types."""
    return [(name, field) for name, field in EVERY if types_of(name, field) & set(hints)]


@pytest.mark.parametrize("kind", WRONG)
def test_no_setting_of_any_method_takes_what_is_no_plain_value(kind: str) -> None:
    for name, field in EVERY:
        with pytest.raises(ConfigError, match=f"{name}: {field}") as error:
            make_config(name, {field: WRONG[kind]()})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e300, 3.5e38, 10**400, np.float64("nan"), np.float64(1e300)]
)
def test_numbers_are_finite_in_float32(value: Any) -> None:
    for name, field in fields_of(float):
        with pytest.raises(ConfigError, match=f"{name}: {field}=.*out of range"):
            make_config(name, {field: value})


@pytest.mark.parametrize("value", [2**31, -(2**31), 2**63, 2**64, 10**400, 10**5000, np.uint64(2**63)], ids=range(7))
def test_whole_numbers_end_below_two_to_the_31(value: Any) -> None:
    for kind, given in ((int, value), (list[int], [value])):
        for name, field in fields_of(kind):
            with pytest.raises(ConfigError, match=f"{name}: {field}=.*out of range"):
                make_config(name, {field: given})


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", "0.5", None, [1]])
def test_truth_text_and_nothing_are_no_numbers(value: Any) -> None:
    for name, field in fields_of(int, float):
        takes = types_of(name, field)
        if (value is None and type(None) in takes) or (isinstance(value, str) and str in takes):
            continue
        if isinstance(value, list) and list[int] in takes:
            continue
        with pytest.raises(ConfigError, match=f"{name}: {field}=.*wrong type"):
            make_config(name, {field: value})


def test_numpy_numbers_become_python_s() -> None:
    config: Any = make_config(
        "block_topk", {"budget": np.int64(9), "block_q": np.int8(4), "high": np.float32(0.5), "bands": np.bool_(True)}
    )
    assert (config.budget, config.block_q, config.high, config.bands) == (9, 4, 0.5, True)
    assert [type(x) for x in (config.budget, config.block_q, config.high, config.bands)] == [int, int, float, bool]
    assert ZeroTuningConfig(gamma=Fraction(1, 2)).gamma == 0.5  # type: ignore[arg-type]
    json.dumps(config.to_dict())


@pytest.mark.parametrize("given", [(1, 2), [1, 2], range(1, 3), (np.int64(1), np.int64(2))])
def test_tuples_stand_for_lists_and_are_saved_as_lists(given: Any, tmp_path: Path) -> None:
    config = ZeroTuningConfig(gamma=2.0, heads=given, layers=given)
    assert config.heads == [1, 2] and config.layers == [1, 2] and type(config.heads) is list
    PatchConfig([config]).save_pretrained(tmp_path)
    assert PatchConfig.from_pretrained(tmp_path).methods == [config]
    with patched(zoo.SUPPORTED["llama"].build(), config) as patch:
        assert patch.layers == [1, 2]


def test_tuples_within_lists() -> None:
    config = HeadScaleConfig(heads=((1, 0), (1, 2)), scales=[(0, 1, 2)])  # type: ignore[arg-type,list-item]
    assert config.heads == [[1, 0], [1, 2]] and config.scales == [[0.0, 1.0, 2.0]]
    assert ACTConfig(heads=((1, 0),)).heads == [[1, 0]]  # type: ignore[arg-type]
    assert FluxConfig(sparse_settings={"window": np.int64(5), "layers": (1, 2)}).sparse_settings == {
        "window": 5,
        "layers": [1, 2],
    }


def test_a_list_is_the_config_s_own() -> None:
    heads = [1, 2]
    config = ZeroTuningConfig(gamma=2.0, heads=heads)
    heads.append(99)
    assert config.heads == [1, 2]


@pytest.mark.parametrize(
    "name,field", [("dhsa", "predictor"), ("gated", "weights"), ("act", "heads"), ("vertical_slash", "head_config")]
)
def test_paths_name_files(name: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text("[[0, 1]]")
    config: Any = make_config(name, {field: tmp_path / "heads.json"})
    assert getattr(config, field) in (str(tmp_path / "heads.json"), [[0, 1]])
    with pytest.raises(ConfigError, match="wrong type"):
        make_config(name, {field: b"heads.json"})


@pytest.mark.parametrize("name", ["executor", "phase"])
def test_a_path_is_no_text(name: str) -> None:
    with pytest.raises(ConfigError, match=f"streaming: {name}=.*wrong type"):
        make_config("streaming", {name: Path("both")})


HEADS = [
    *({"heads": h} for h in ([[1.5, 0]], [[True, 0]], [1, 2], {1: 2}, "[[1, 0]]")),
    *({"heads": [[1, 0]], "factor": f} for f in (1e6, -1e6, math.nan)),
    *({"scales": [[layer, 0, 1]]} for layer in (1.5, math.nan, "1")),
    *({"scales": [[1, head, 1]]} for head in (0.5, math.inf, None)),
    *({"scales": [[1, 0, factor]]} for factor in (1e6, math.nan, True)),
    {"scales": [[1, 0]]},
]


@pytest.mark.parametrize("settings", HEADS, ids=str)
def test_head_lists(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="head_scale"):
        HeadScaleConfig(**settings)


@pytest.mark.parametrize(
    "threshold", ["nan/N", "inf/N", "1e400/N", "1e300/N", "0/N", "-1/N", "x/N", "5/M", "", "9" * 5000 + "/N", 0, -1.0]
)
def test_thresholds(threshold: Any) -> None:
    with pytest.raises(ConfigError, match="act: threshold="):
        ACTConfig(threshold=threshold)


@pytest.mark.parametrize(
    "content",
    [
        '{"heads": [[1, 2], [1, true]]}',
        "[[1, 1e400]]",
        "[[1]]",
        "[1, 2]",
        "[" * 100000,
        '{"heads": [], "heads": []}',
        "\xff",
        "5",
        "[[1, 99999999999]]",
    ],
)
def test_head_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match="act: "):
        ACTConfig(heads=str(tmp_path / "heads.json"))


@pytest.mark.parametrize("file", ["/dev/zero", "/dev", "a pipe", "x" * 5000, "a\0b"])
def test_files_that_are_none(file: str, tmp_path: Path) -> None:
    if file == "a pipe":
        file = str(tmp_path / "pipe")
        os.mkfifo(file)
    with pytest.raises(ConfigError, match="act: heads="):
        ACTConfig(heads=file)
    with pytest.raises(ConfigError, match="vertical_slash: head_config="):
        get_method("vertical_slash")(make_config("vertical_slash", {"head_config": file}))


BUDGETS = [
    *("[", "5", "[[]]", "[5]", "[{}]", '[{"0": [[], 1, 2]}]', '[{"0": ["x", 1, 2]}]'),
    *('[{"1": ["vertical_and_slash", 1, 2]}]', '[{"0": ["vertical_and_slash", 1]}]'),
    *(f'[{{"0": ["vertical_and_slash", {n}, 2]}}]' for n in ("1.5", "true", "1e99", "9999999999", "-1", '"1"')),
]


@pytest.mark.parametrize("content", BUDGETS)
def test_budget_files(content: str, tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(ConfigError, match="vertical_slash: head_config="):
        patch_model(zoo.SUPPORTED["llama"].build(), "vertical_slash", head_config=tmp_path / "heads.json")


@pytest.mark.parametrize(
    "layers", ["9" * 5000, "1-²", "0-" + "9" * 5000, "٣", "1--", "a" * 5000, "", ",", "0,,1", "\0"]
)
def test_layers_as_text(layers: str) -> None:
    model = zoo.SUPPORTED["llama"].build()
    before = tree(model)
    with pytest.raises(ConfigError, match="layers") as error:
        patch_model(model, "streaming", layers=layers)
    assert len(str(error.value)) < 300 and tree(model) == before


def test_names_of_settings_that_are_no_text() -> None:
    for name in BUILTIN:
        with pytest.raises(ConfigError, match="there is no setting"):
            get_method(name).config_class.from_dict({5: 1, "a": 2, None: 3})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="names with values"):
        StreamingConfig.from_dict([("window", 3)])  # type: ignore[arg-type]


def test_a_setting_changed_afterwards_is_checked_when_it_is_used() -> None:
    config = StreamingConfig(window=8)
    config.window = 0
    with pytest.raises(ConfigError, match="window=0"):
        patch_model(zoo.SUPPORTED["llama"].build(), config)
    config.window, config.sink = 4, np.int64(2)  # type: ignore[assignment]
    with patched(zoo.SUPPORTED["llama"].build(), config):
        assert type(config.sink) is int


@pytest.mark.parametrize("name", [5, None, [], {}, b"streaming", "a" * 5000, "\n", Odd()], ids=range(8))
def test_methods_that_have_no_such_name(name: Any) -> None:
    for call in (
        lambda: make_config(name, {}),
        lambda: get_method(name),
        lambda: patch_model(zoo.SUPPORTED["llama"].build(), name),
    ):
        with pytest.raises(HfpatchError) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prefill", [0.9999, 1.0])
@pytest.mark.parametrize("scale", [None, 85.97, 1e30])
def test_skip_softmax_keeps_the_largest_tile_at_any_threshold(prefill: float, scale: float | None) -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, 63)
    own = {"prefill": prefill, "decode": prefill, "prefill_scale": scale, "decode_scale": scale}
    with patched(model, "skip_softmax", min_length=0, block_q=8, block_k=8, **own) as patch, torch.no_grad():
        out = model(ids, use_cache=True)
        assert out.logits.isfinite().all() and 0 < patch.report().density() < 1
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 65)


def test_a_gate_s_start_stays_finite_in_half_precision() -> None:
    for bias in (1e4, -1e4):
        model = zoo.SUPPORTED["llama"].build().to(torch.float16)
        with patched(model, GatedConfig(form="sigmoid", start_bias=bias)), torch.no_grad():
            assert model(zoo.prompt(model, 1, 20)).logits.isfinite().all()


DOUBLE = [*("streaming", "dhsa", "block_topk", "quest", "zerotuning", "act", "gated", "xattention", "flash_prefill"),
          *("vertical_slash", "skip_softmax", "pattern")]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DOUBLE)
def test_models_of_every_kind_of_number(name: str, dtype: torch.dtype) -> None:
    from methods_list import METHODS

    model = zoo.SUPPORTED["llama"].build(num_hidden_layers=2).to(dtype)
    settings = next((c.settings for c in METHODS if c.name == name), {})
    with patched(model, name, **settings), torch.no_grad():
        out = model(zoo.prompt(model, 2, 63), use_cache=True)
        assert out.logits.isfinite().all()
        assert model.generate(zoo.prompt(model, 2, 63), max_new_tokens=3, do_sample=False).shape == (2, 66)
