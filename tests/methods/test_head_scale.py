"""Constant factors per head against the same factors on the rows of the output projection."""

import copy
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits

import hfpatch
from hfpatch import PatchConfig, patched
from hfpatch.methods.head_scale import HeadScaleConfig

SCALES = [[0, 1, 0.0], [0, 3, 2.5], [2, 7, -1.0]]


def edited() -> Any:
    """The model whose output projections carry the factors."""
    model = copy.deepcopy(built("llama"))
    with torch.no_grad():
        for layer, head, factor in SCALES:
            model.model.layers[int(layer)].self_attn.o_proj.weight[:, int(head) * 16 : int(head + 1) * 16] *= factor
    return model


@pytest.mark.parametrize("form", ["lists", "tensor"])
def test_equals_scaled_output_projection(form: str) -> None:
    model = built("llama")
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 63), [63, 30])
    want = logits(edited(), ids, attention_mask=mask)
    scale = torch.ones(3, 8)
    for layer, head, factor in SCALES:
        scale[int(layer), int(head)] = factor
    lists = PatchConfig([HeadScaleConfig(heads=[[0, 1]], scales=SCALES[1:])])
    config = lists if form == "lists" else PatchConfig([HeadScaleConfig()], tensors={"0.scale": scale})
    with patched(model, config) as patch:
        got = logits(model, ids, attention_mask=mask)
        assert patch.layers == ([0, 2] if form == "lists" else [0, 1, 2])
    assert_close("logits", got[mask.bool()], want[mask.bool()])


def test_factor_one_is_the_identity() -> None:
    model = built("gpt_oss")
    ids = zoo.prompt(model, 1, 63)
    want = logits(model, ids)
    with patched(model, "head_scale", heads=[[1, 0]], factor=1.0):
        assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"heads": [[1]]}, "pairs"),
        ({"heads": [[1, 2], [1, 2]]}, "twice"),
        ({"heads": [[1, -2]]}, "from 0 on"),
        ({"heads": [[1, 8]]}, "no head 8"),
        ({"heads": [[1, 2], [7, 0]]}, "heads of layer 7"),
        ({"heads": [[0, 0], [1, 0]], "layers": 1}, "heads of layer 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(hfpatch.ConfigError, match=match):
        hfpatch.patch_model(built("llama"), "head_scale", **settings)


def test_no_heads_patch_nothing() -> None:
    with pytest.raises(hfpatch.NothingPatchedError):
        hfpatch.patch_model(built("llama"), "head_scale")
