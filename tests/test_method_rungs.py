"""What a method gets from its base for its settings, and a block method that is nothing but its scores."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import logits

from hfpatch import BlockConfig, BlockSelector, Method, MethodConfig, get_method, list_methods, option, patched
from hfpatch.config import registry
from hfpatch.config.registry import make_config
from hfpatch.core.call import AttentionCall


def made(name: str, **settings: Any) -> Method:
    return get_method(name)(make_config(name, settings))


def having(setting: str) -> list[str]:
    return [n for n in list_methods() if setting in {f.name for f in dataclasses.fields(get_method(n).config_class)}]


@pytest.mark.parametrize("name", list_methods())
def test_the_config_class_is_declared_once(name: str) -> None:
    cls = get_method(name)
    assert cls.config_class.method == name and made(name).config == cls.config_class()


@pytest.mark.parametrize("name", having("phase"))
def test_phase_narrows_where_a_method_acts(name: str) -> None:
    both = made(name).acts_in
    assert both == {"prefill", "decode"}
    assert {made(name, phase=p).acts_in for p in ("prefill", "decode")} == {
        frozenset({"prefill"}),
        frozenset({"decode"}),
    }


@pytest.mark.parametrize("name", having("dense_layers"))
def test_dense_layers_are_left_out(name: str) -> None:
    assert made(name, dense_layers=2).pick([0, 1, 2, 5]) == [2, 5] and made(name, dense_layers=0).pick([0, 3]) == [
        0,
        3,
    ]


@pytest.mark.parametrize("name", having("min_length"))
def test_min_length_is_noted_where_it_means_something(name: str) -> None:
    assert made(name, min_length=50).notes() == [f"{name}: calls with fewer than 50 keys run dense (min_length)"]
    assert made(name, min_length=0).notes() == []


@pytest.mark.parametrize("name", having("min_length"))
def test_shorter_calls_run_dense(name: str) -> None:
    sparse = next(c.settings for c in METHODS if c.name == name)
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 63)
    density = []
    for least in (63 + 8, 63):
        with patched(model, name, **{**sparse, "min_length": least}) as patch, torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            for token in range(3):
                model(ids[:, token : token + 1], past_key_values=cache)
            density.append(patch.report().density())
    assert density[0] == 1 and density[1] < 1


@dataclass(kw_only=True)
class NearestConfig(BlockConfig):
    """Settings of `nearest`."""

    method: ClassVar[str] = "nearest"
    blocks: int = option(2, "blocks up to the tile's own", ge=1)


class Nearest(BlockSelector[NearestConfig]):
    """The last `blocks` blocks: a block method of one's own is its scores."""

    def scores(self, call: AttentionCall, grid: Any) -> torch.Tensor:
        age = (grid.last // grid.block_k)[:, None] - grid.blocks
        return (self.config.blocks - age).clamp(min=0).float()[None, None]


def test_a_block_method_is_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered, "nearest", Nearest)
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, 64)
    want = logits(model, ids)
    with patched(model, "nearest", block_q=8, block_k=8, min_length=0, blocks=8):
        torch.testing.assert_close(logits(model, ids), want, atol=1e-4, rtol=1e-4)
    with patched(model, "nearest", block_q=8, block_k=8, min_length=0) as patch:
        assert not torch.equal(logits(model, ids), want)
        assert patch.report().density() == pytest.approx((8 * 36 + 7 * 64) / (64 * 65 / 2))


def test_a_method_may_still_name_its_config_class() -> None:
    @dataclass(kw_only=True)
    class OldConfig(MethodConfig):
        method: ClassVar[str] = "old"

    class Old(Method):
        config_class = OldConfig

    class Older(Old):
        """Inherits what it does not say."""

    assert Old(OldConfig()).name == "old" and Older.config_class is OldConfig


@pytest.mark.parametrize("case", [c for c in METHODS if issubclass(get_method(c.name), BlockSelector)], ids=str)
def test_the_question_attends_densely_and_the_rest_as_without_it(case: MethodCase) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 63, 16), torch.randn(2, 2, 63, 16), torch.randn(2, 2, 63, 16)
    call = AttentionCall(0, 1, "prefill", q, k, v, 0.25)
    mask = made(case.name, **{**case.settings, "question_tokens": 9}).select(call).mask(call.layout)
    assert bool(mask[:, :, 54:].eq(call.k_pos <= call.q_pos[54:, None]).all())
    first = call.first(54)
    alone = made(case.name, **{**case.settings, "question_tokens": 0}).select(first).mask(first.layout)
    assert torch.equal(mask[:, :, :54, :54], alone) and not mask[:, :, :54, 54:].any()
    assert made(case.name, **{**case.settings, "question_tokens": 63}).select(call) is None
