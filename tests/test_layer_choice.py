"""Which layers a patch takes: the syntax of `layers`, what it leaves alone, and what it says of that."""

from typing import Any

import pytest
import torch
import zoo
from injection_helpers import SPARSE, fresh
from test_invariants import LENGTH, built, logits, tree

import hfpatch
from hfpatch import ConfigError, NothingPatchedError, get_patch, patch_model, patched
from hfpatch.config.layers import parse_layers

LAYERS: list[tuple[Any, list[int]]] = [
    (None, list(range(10))),
    (3, [3]),
    (-1, [9]),
    ([8, 0, -1, 8], [0, 8, 9]),
    ([], []),
    ("2-", list(range(2, 10))),
    ("0-3,8", [0, 1, 2, 3, 8]),
    ("-4-", [6, 7, 8, 9]),
    ("0--8", [0, 1, 2]),
    (" 1 , 2 - 3 ", [1, 2, 3]),
    ("-1", [9]),
    ("9", [9]),
]


@pytest.mark.parametrize("spec,want", LAYERS)
def test_layer_syntax(spec: Any, want: list[int]) -> None:
    assert parse_layers(spec, 10) == want


@pytest.mark.parametrize(
    "spec",
    ["", "x", "1-2-3", "1..3", "1,,2", "3-1", "-1-2", 10, -11, [0, 10], "10", "5-12", "all", "1:3", "--3", "2-,"],
)
def test_layers_that_make_no_sense_raise_before_anything_changes(spec: Any) -> None:
    model = fresh(num_hidden_layers=10)
    before = tree(model)
    with pytest.raises(ConfigError, match="layers"):
        patch_model(model, "streaming", layers=spec)
    assert tree(model) == before


@pytest.mark.parametrize("spec", [1.5, True, ["1"], {"a": 1}, [[0]]])
def test_layers_of_a_wrong_type_raise(spec: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        hfpatch.get_method("streaming").config_class(layers=spec)


def test_methods_meet_only_where_both_were_asked_for() -> None:
    model = fresh()
    config = hfpatch.get_method("streaming").config_class
    patch_model(model, [config(sink=0, window=9, layers="1-"), config(sink=0, window=4, layers=[0, 2])])
    logits(model, zoo.prompt(model, 1, LENGTH))
    attended = {line.layer: int(line.stats.attended) for line in get_patch(model).report().lines}
    want = {n: sum(min(i + 1, w) for i in range(LENGTH)) * 8 for n, w in {0: 4, 1: 9, 2: 4}.items()}
    assert attended == want


def test_a_patch_of_one_layer_changes_that_layer_only() -> None:
    model = fresh()
    hidden = []
    ids = zoo.prompt(model, 1, LENGTH)
    for layers in (None, 1):
        if layers is not None:
            patch_model(model, **SPARSE, layers=layers)
        with torch.no_grad():
            hidden.append(model(ids, output_hidden_states=True).hidden_states)
    assert torch.equal(hidden[0][1], hidden[1][1]) and not torch.equal(hidden[0][2], hidden[1][2])


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "gpt_oss"])
def test_part_of_the_layers_is_said(name: str) -> None:
    with patched(built(name), **SPARSE) as patch:
        assert patch.layers == zoo.SUPPORTED[name].full_layers == [1, 3]
        assert "2 of 4 layers patched" in str(patch.report()) and "2 of 4 layers" in repr(patch)


@pytest.mark.parametrize(
    "layers,reason", [([], "not chosen"), ([0, 2], "sliding attention"), (0, "sliding attention")]
)
def test_nothing_patched(layers: Any, reason: str) -> None:
    model = built("gemma2")
    before = tree(model)
    with pytest.raises(NothingPatchedError, match=reason):
        patch_model(model, "streaming", layers=layers)
    assert tree(model) == before


def test_dense_layers_can_leave_nothing() -> None:
    with pytest.raises(NothingPatchedError, match="3 x left dense by streaming"):
        patch_model(built("llama"), "streaming", dense_layers=3)
