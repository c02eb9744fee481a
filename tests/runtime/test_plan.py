"""What patching would do, asked without doing it."""

import pytest
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import acts_on, built, tree

import hfpatch
from hfpatch import NothingPatchedError, patched
from hfpatch.api import plan_patch

MODELS = ["llama", "gemma2", "qwen3_next", "llava"]
PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in MODELS
    for case in METHODS
    if acts_on(zoo.SUPPORTED[name], case)
]


@pytest.mark.parametrize("name,case", PAIRS)
def test_a_plan_names_the_layers_that_patching_patches(name: str, case: MethodCase) -> None:
    model = built(name)
    before = tree(model)
    plan = plan_patch(model, case.name, **case.settings)
    plan.prepare()
    assert tree(model) == before
    with patched(model, case.name, **case.settings) as patch:
        assert [layer.index for layer, _ in plan.patched] == patch.layers
        assert [what for layer, what in plan if layer.index in patch.layers] == [case.name] * len(patch.layers)
        assert plan.skipped == patch.report().skipped
    assert len(plan) == len(plan.survey.layers) and plan[-1] == list(plan)[-1] and plan[:2] == list(plan)[:2]


def test_a_plan_says_why_nothing_would_be_patched() -> None:
    plan = plan_patch(built("mistral"), "streaming")
    assert [what for _, what in plan] == ["sliding attention"] * 3
    with pytest.raises(NothingPatchedError, match="3 x sliding attention"):
        plan.prepare()


def test_a_plan_refuses_what_patching_refuses() -> None:
    plan = plan_patch(built("qwen3_next"), "gated")
    with pytest.raises(hfpatch.UnsupportedModelError, match="twice"):
        plan.prepare()
