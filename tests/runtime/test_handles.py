"""Putting a patch on and taking it off: one patch per layer whoever asks, blocks left in any order."""

import copy
from typing import Any

import pytest
import torch
import zoo
from handle_helpers import STREAMING, carrying, fresh
from test_invariants import tree
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

import hfpatch.api as api
from hfpatch import AlreadyPatchedError, HfpatchError, NotPatchedError, get_patch, patch_model, patched, unpatch_model


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("outer", [False, True], ids=["bare", "over a patch"])
def test_blocks_may_be_left_in_any_order(order: tuple[int, ...], outer: bool) -> None:
    model = fresh()
    if outer:
        patch_model(model, "streaming", sink=1, window=5)
    ids = zoo.prompt(model, 1, 40)
    want, before = model(ids).logits, tree(model)
    blocks = [patched(model, "streaming", sink=2, window=8 + n) for n in range(len(order))]
    handles = [block.__enter__() for block in blocks]
    left = list(range(len(order)))
    for n in order:
        blocks[n].__exit__(None, None, None)
        left.remove(n)
        if left:
            assert get_patch(model) is handles[max(left)]
    assert torch.equal(model(ids).logits, want)
    assert outer or tree(model) == before


def part_and_whole(kind: str) -> tuple[nn.Module, nn.Module, PreTrainedModel]:
    """Two objects around the same layers, and a model to run."""
    model = fresh()
    if kind == "inner and outer":
        return model.model, model, model
    if kind == "wrapper":
        return model, nn.DataParallel(model), model
    if kind == "two heads":
        other = LlamaForSequenceClassification(model.config)
        other.model = model.model
        return model, other, model
    return model, nn.Sequential(model), model


@pytest.mark.parametrize("turned", [False, True], ids=["in", "out"])
@pytest.mark.parametrize("kind", ["inner and outer", "wrapper", "two heads", "container"])
def test_layers_take_one_patch_through_whatever_object(kind: str, turned: bool) -> None:
    one, two, model = part_and_whole(kind)
    one, two = (two, one) if turned else (one, two)
    ids = zoo.prompt(model, 1, 40)
    want, clean = model(ids).logits, tree(model)
    patch_model(one, **STREAMING)
    sparse, before = model(ids).logits, tree(model)
    with pytest.raises(AlreadyPatchedError, match="carries a patch already"):
        patch_model(two, "zerotuning", gamma=2.0)
    assert tree(model) == before and torch.equal(model(ids).logits, sparse)
    assert get_patch(two).report().density() < 1
    with patched(two, "dense"):
        assert torch.equal(model(ids).logits, want)
    assert torch.equal(model(ids).logits, sparse)
    unpatch_model(two)
    assert tree(model) == clean and torch.equal(model(ids).logits, want)
    for thing in (one, two):
        with pytest.raises(NotPatchedError):
            get_patch(thing)
    patch_model(two, **STREAMING)
    assert torch.equal(model(ids).logits, sparse)
    unpatch_model(one)
    assert tree(model) == clean


def test_a_part_of_the_patched_layers_is_not_undone_alone() -> None:
    model = patch_model(fresh(), **STREAMING)
    with pytest.raises(NotPatchedError, match="1 of 3 patched layers"):
        unpatch_model(model.model.layers[1])
    assert len(carrying(model)) == 3


def test_the_object_that_was_patched_may_go() -> None:
    model = fresh()
    wrapper = nn.Sequential(model)
    patch_model(wrapper, **STREAMING)
    del wrapper
    ids = zoo.prompt(model, 1, 40)
    model(ids)
    assert "streaming" in str(get_patch(model).report()) and get_patch(model).config.methods[0].window == 8
    unpatch_model(model)
    assert not carrying(model)


def test_merged_adapters_keep_the_patch_and_its_undoing() -> None:
    peft = pytest.importorskip("peft", reason="peft, which nothing else needs, is not installed")
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"]))
    patch_model(model, **STREAMING)
    merged = model.merge_and_unload()
    merged(zoo.prompt(merged, 1, 40))
    assert get_patch(merged).report().density() < 1
    unpatch_model(merged)
    assert not carrying(merged)


def test_copies_of_a_part_stand_alone() -> None:
    model = patch_model(fresh(), **STREAMING)
    twin = copy.deepcopy(model.model)
    assert len(carrying(twin)) == 3
    unpatch_model(twin)
    assert not carrying(twin) and len(carrying(model)) == 3


SPANS: list[Any] = [5, None, [5], ["ab"], [(0, "x")], [(0.5, 2.5)], "xx", [(0, float("nan"))], {}, [[1, 2, 3]], ()]


@pytest.mark.parametrize("rows", [*SPANS, [(True, 2)], [(3, 2)], [(-1, 2)]], ids=repr)
def test_spans_that_are_none(rows: Any) -> None:
    model = patch_model(fresh(), **STREAMING)
    with pytest.raises(HfpatchError, match="one \\(start, stop\\) per row"), get_patch(model).spans(question=rows):
        pass


@pytest.mark.parametrize("thing", [None, 5, "model", object(), PreTrainedModel, nn.Linear])
def test_what_is_no_model(thing: Any) -> None:
    for act in (lambda: api.plan_patch(thing, "streaming"), lambda: patch_model(thing, "streaming")):
        with pytest.raises(HfpatchError, match="Expected a loaded Transformers model"):
            act()
    with pytest.raises(NotPatchedError):
        get_patch(thing)
