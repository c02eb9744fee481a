"""Learned tensors: what a method declares is what it takes; anything else is refused by name, the model untouched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from learned_cases import DHSA, FITTING, HEADS, HIDDEN, OTHERS, gates
from test_invariants import built, logits, tree
from torch import Tensor

from hfpatch import ConfigError, HfpatchError, Method, MethodConfig, PatchConfig, patched
from hfpatch.api import plan_patch
from hfpatch.config import registry
from hfpatch.config.registry import make_config
from hfpatch.core.learned import Learned, ModelSizes
from hfpatch.methods.dhsa.predictor import load_predictor
from hfpatch.runtime.model_sizes import model_sizes


def patch_of(method: str, settings: dict[str, Any], tensors: Mapping[str, Any]) -> PatchConfig:
    return PatchConfig([make_config(method, settings)], None, {f"0.{k}": t for k, t in tensors.items()})


@pytest.mark.parametrize("case", FITTING)
def test_what_fits_is_taken_and_saved(case: str, tmp_path: Any) -> None:
    method, settings, tensors = FITTING[case]
    model = built("llama")
    ids = zoo.prompt(model, 2, 40)
    with patched(model, patch_of(method, settings, tensors)) as patch:
        want = logits(model, ids)
        assert want.isfinite().all() and set(patch.config.tensors) == {f"0.{k}" for k in tensors}
        patch.save_pretrained(tmp_path)
    with patched(model, PatchConfig.from_pretrained(tmp_path)):
        assert torch.equal(logits(model, ids), want)


COMMON: dict[str, Callable[[Tensor], Any]] = {
    "a dimension less": lambda t: t[0],
    "a dimension more": lambda t: t[None],
    "no dimension": lambda t: t.flatten()[0],
    "longer": lambda t: torch.cat([t, t]),
    "shorter": lambda t: t[:1],
    "empty": lambda t: t[:0],
    "complex": lambda t: t.to(torch.complex64),
    "truth": lambda t: t.to(torch.bool),
    "nowhere": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "a list": lambda t: t.tolist(),
    "nothing": lambda t: None,
    "a number": lambda t: 3.0,
    "an array": lambda t: t.float().numpy(),
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e30}


PER_HEAD = ("gamma by layer", "a dimension less")  # fits: one factor per head for all layers


@pytest.mark.parametrize(
    "case,change", [(case, c) for case in FITTING for c in (*COMMON, *VALUES) if (case, c) != PER_HEAD]
)
def test_what_does_not_fit_is_refused_by_name(case: str, change: str) -> None:
    """Every tensor of every method, one at a time."""
    method, settings, tensors = FITTING[case]
    model = built("llama")
    before = tree(model)
    for name, tensor in list(tensors.items())[:8]:
        if change in VALUES:
            if not tensor.is_floating_point():
                continue
            wrong: Any = tensor.clone().float()
            wrong.view(-1)[-1] = VALUES[change]
        else:
            wrong = COMMON[change](tensor)
        if isinstance(wrong, Tensor) and wrong.shape == tensor.shape and change in ("shorter", "longer"):
            continue  # a tensor of one entry
        with pytest.raises(ConfigError) as error, patched(model, patch_of(method, settings, {**tensors, name: wrong})):
            pass
        text = str(error.value)
        assert name in text and "\n" not in text and tree(model) == before
        with pytest.raises(ConfigError):
            plan_patch(model, patch_of(method, settings, {**tensors, name: wrong}))


@pytest.mark.parametrize("case", OTHERS)
def test_what_belongs_to_another_model_or_form(case: str) -> None:
    method, settings, tensors, said = OTHERS[case]
    model = built("llama")
    before = tree(model)
    with pytest.raises(ConfigError, match=said) as error, patched(model, patch_of(method, settings, tensors)):
        pass
    assert len(str(error.value)) < 500 and tree(model) == before


NO_NAMES = [
    *(
        "1.gamma",
        "9.gamma",
        "-1.gamma",
        "00.gamma",
        "x",
        "",
        "0",
        "0.",
        ".gamma",
        "0gamma",
        "\u0660.gamma",
        "0 .gamma",
    ),
    *("9" * 5000 + ".gamma", "\ud800", 0, None, b"0.gamma", ("0", "gamma")),
]


@pytest.mark.parametrize("key", NO_NAMES, ids=range(len(NO_NAMES)))
def test_names_that_belong_to_no_method(key: Any) -> None:
    model = built("llama")
    before = tree(model)
    for more in ({}, {"0.gamma": torch.full((HEADS,), 3.0)}):
        config = PatchConfig([make_config("zerotuning", {})], None, {**more, key: torch.full((HEADS,), 3.0)})
        with pytest.raises(ConfigError, match=r"belongs to none of the 1 methods.*'0\.gamma'"), patched(model, config):
            pass
        assert tree(model) == before


@pytest.mark.parametrize("tensors", [[], 5, "x", None, {1, 2}, torch.ones(3)], ids=str)
def test_tensors_that_are_no_dict(tensors: Any) -> None:
    with (
        pytest.raises(ConfigError, match="a dict by name"),
        patched(built("llama"), PatchConfig([make_config("zerotuning", {})], None, tensors)),
    ):
        pass


@pytest.mark.parametrize("methods", [[], (), None, "streaming", ["streaming"], [None], {"method": "streaming"}, 5])
def test_a_patch_config_is_a_list_of_method_configs(methods: Any) -> None:
    with pytest.raises(ConfigError, match="non-empty list of method configs"):
        PatchConfig(methods)


def test_a_list_s_second_method_gets_its_own(tmp_path: Any) -> None:
    config = PatchConfig(
        [make_config("streaming", {}), make_config("zerotuning", {})], None, {"1.gamma": torch.full((HEADS,), 3.0)}
    )
    with patched(built("llama"), config) as patch:
        assert torch.equal(patch.methods[1].given["gamma"], config.tensors["1.gamma"])
    with (
        pytest.raises(ConfigError, match=r"streaming.*takes none"),
        patched(built("llama"), PatchConfig(config.methods, None, {"0.gamma": torch.ones(HEADS)})),
    ):
        pass


@pytest.mark.parametrize("case", ["sizes zero", "a window of 2^40", "a weight missing", "a weight of another size"])
def test_a_predictor_loaded_by_name_is_held_to_the_same(case: str, tmp_path: Any) -> None:
    _, _, tensors, said = OTHERS[case]
    patch_of("dhsa", {}, tensors).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_predictor(tmp_path)
    with pytest.raises(ConfigError, match=said), patched(built("llama"), "dhsa", **{**DHSA, "predictor": tmp_path}):
        pass


def test_gates_loaded_by_name_are_held_to_the_same(tmp_path: Any) -> None:
    patch_of("gated", {}, gates(torch.zeros(3, 3))).save_pretrained(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"layers\.0\.weight is float32"),
        patched(built("llama"), "gated", weights=tmp_path),
    ):
        pass


def test_a_sparse_branch_s_file_is_held_to_the_same(tmp_path: Any) -> None:
    (tmp_path / "heads.json").write_text('[{"0": ["vertical_and_slash", 1, 2]}]')
    own = {"sparse": "vertical_slash", "sparse_settings": {"head_config": str(tmp_path / "heads.json")}}
    with (
        pytest.raises(ConfigError, match="per_head is int64"),
        patched(built("llama"), "flux", sparse_layers="0-", **own),
    ):
        pass


def test_half_precision_has_its_own_limit() -> None:
    model = zoo.SUPPORTED["llama"].build(num_hidden_layers=1)
    with patched(model, patch_of("gated", {}, gates(torch.full((HEADS, HIDDEN), 1e5)))):
        assert logits(model, zoo.prompt(model, 1, 9)).isfinite().all()
    with (
        pytest.raises(ConfigError, match="between -65504 and 65504"),
        patched(model.half(), patch_of("gated", {}, gates(torch.full((HEADS, HIDDEN), 1e5)))),
    ):
        pass


@pytest.mark.parametrize("name", [t.name for t in zoo.SUPPORTED.values()])
def test_sizes_are_those_of_the_attention_modules(name: str) -> None:
    """Heads times value width is what the output projection reads, and hidden what the module is given."""
    model = built(name)
    found = model_sizes(model)
    seen: list[tuple[int, ...]] = []
    from hfpatch.runtime.survey import survey

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape)

    layers = survey(model).layers
    hooks = [x.module.register_forward_pre_hook(look, with_kwargs=True) for x in layers]
    logits(model, zoo.prompt(model, 1, 9))
    for hook in hooks:
        hook.remove()
    assert {s[-1] for s in seen} == {found.hidden} and found.layers == model.config.get_text_config().num_hidden_layers
    for x in layers:
        out = next(m for n, m in x.module.named_children() if n in ("o_proj", "c_proj", "dense", "out_proj"))
        width = getattr(out, "in_features", None) or out.weight.shape[0]
        assert found.heads and found.value_dim and found.heads * found.value_dim == width


@dataclass(kw_only=True)
class ToyConfig(MethodConfig):
    method: ClassVar[str] = "toy-learner"


class Toy(Method):
    """Declares one tensor, and needs no other line for it."""

    config_class = ToyConfig

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        return {"mix": Learned((sizes.heads, 2), ge=0, le=1)}


class Silent(Method):
    """Says nothing of its tensors: takes what it is given."""

    config_class = ToyConfig

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.given)


def test_a_new_method_gets_all_this_by_declaring(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(registry._registered, "toy-learner", Toy)
    model = built("llama")
    with patched(model, patch_of("toy-learner", {}, {"mix": torch.rand(HEADS, 2)})) as patch:
        patch.save_pretrained(tmp_path)
    assert set(PatchConfig.from_pretrained(tmp_path).tensors) == {"0.mix"}
    for wrong in ({"mix": torch.rand(HEADS, 3)}, {"mix": 2 + torch.rand(HEADS, 2)}, {"other": torch.rand(HEADS, 2)}):
        with pytest.raises(HfpatchError, match="toy-learner: "), patched(model, patch_of("toy-learner", {}, wrong)):
            pass
    monkeypatch.setitem(registry._registered, "toy-learner", Silent)
    with patched(model, patch_of("toy-learner", {}, {"anything": torch.rand(3)})) as patch:
        assert set(patch.config.tensors) == {"0.anything"}
