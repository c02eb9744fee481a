"""Decode steps in one kernel call equal the general way, constant factors are a bias, and base attention gives way."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built
from torch import Tensor

from hfpatch import patched
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns, as_bias, reweight
from hfpatch.core.selection import SinkWindow
from hfpatch.ops import attend, attend_out, executors, torch_decode, watched
from hfpatch.ops.call import check
from hfpatch.ops.torch_decode import beats_sdpa, one_query


def call_of(
    batch: int, lk: int = 90, hkv: int = 2, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> AttentionCall:
    torch.manual_seed(0)
    q = torch.randn(batch, 6, 1, 16, dtype=dtype)
    k, v = torch.randn(2, batch, hkv, lk, 16, dtype=dtype)
    rows = tuple(range(batch))
    return AttentionCall(layer=0, num_layers=1, phase="decode", q=q, k=k, v=v, scale=0.3, rows=rows, **kwargs)


def run(call: AttentionCall, executor: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    more = {"softcap": call.softcap, "sinks": call.sinks, "bias": bias, "executor": executor}
    done = attend(call.q, call.k, call.v, selection=None, scale=call.scale, **more)
    return done.out, done.lse


SAME, VARIED = torch.full((6,), 3.0), torch.tensor([0.001, 0.5, 1.0, 2.0, 8.0, 100.0])


def run_out(call: AttentionCall, bias: Tensor | None) -> Tensor:
    out = one_query(check(call.q, call.k, call.v, None, call.scale, call.softcap, call.sinks, bias))
    assert out is not None
    return out


FACTORS = {"same": SAME, "varied": VARIED}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {}, "softcap": {"softcap": 3.0}, "sinks": {"sinks": torch.linspace(-1, 1, 6)},
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hkv", [1, 2, 6])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_constant_factors_are_a_bias(batch: int, hkv: int, extra: dict[str, Any], factor: Tensor) -> None:
    columns = [Columns(slice(0, 1), factor, positive=True)]
    for lk in (90, 91, 3000, 1):  # the bias is cut from a buffer that grows
        call = call_of(batch, lk, hkv, **extra)
        unsure = [Columns(slice(0, 1), factor)]  # what is left of little weight is worked out from all keys
        want = reweight(call, *run(call, "reference", None), unsure, None)
        bias, rest = as_bias(call, columns)
        assert not rest and bias is not None
        for got, expected in zip(run(call, "torch", bias), want, strict=True):
            assert got.shape == expected.shape
            assert_close(f"{lk} keys", got, expected)
        if not extra:
            assert_close(f"{lk} keys, without lse", run_out(call, bias), want[0])
            assert_close(f"{lk} keys, dense", run_out(call, None), run(call, "reference", None)[0])


def test_the_bias_of_a_call_and_factors_on_any_columns_add_up() -> None:
    call = call_of(2, bias=torch.linspace(-1, 1, 90).expand(2, 6, 90))
    columns = [Columns(slice(0, 2), VARIED, positive=True), Columns(torch.tensor([1, 40]), SAME, positive=True)]
    want = reweight(call, *run(call, "reference", call.bias), columns, None)
    bias, rest = as_bias(call, columns)
    assert not rest
    for got, expected in zip(run(call, "torch", bias), want, strict=True):
        assert_close("out and lse", got, expected)


def test_constants_behind_what_looks_at_weights_stay_in_their_place() -> None:
    first, look = Columns(slice(0, 1), SAME, positive=True), Columns(slice(1, 2), lambda w: 1 + w)
    zero, unsure = Columns(slice(0, 1), 0.0), Columns(slice(0, 1), SAME)
    for groups, left in (([first, look, first], 2), ([look, first], 2), ([zero], 1), ([unsure], 1), ([first] * 2, 0)):
        assert len(as_bias(call_of(1), groups)[1]) == left


def test_a_factor_that_learns_keeps_its_gradient() -> None:
    call, factor = call_of(2), VARIED.clone().requires_grad_()
    bias, _ = as_bias(call, [Columns(slice(0, 1), factor, positive=True)])
    run(call, "torch", bias)[0].square().sum().backward()
    assert factor.grad is not None and float(factor.grad.abs().max()) > 0


def test_what_is_left_to_the_general_way() -> None:
    for call in (call_of(1, softcap=5.0), call_of(1, sinks=torch.zeros(6)), call_of(1, dtype=torch.float64)):
        assert one_query(check(call.q, call.k, call.v, None, 0.3, call.softcap, call.sinks, None)) is None
    call = call_of(1)
    assert one_query(check(call.q, call.k, call.v, SinkWindow(1, 4), 0.3, None, None, None)) is None
    call.q.requires_grad_()
    assert one_query(check(call.q, call.k, call.v, None, 0.3, None, None, None)) is None


def test_output_alone_is_watched_and_falls_back() -> None:
    seen = []
    call = call_of(2)
    with watched(lambda problem, out, executor: seen.append((out, executor))):
        for extra in ({}, {"softcap": 3.0}, {"selection": SinkWindow(1, 4)}):
            asked = {"selection": None, "scale": 0.3, **extra}
            out, name = attend_out(call.q, call.k, call.v, **asked)
            assert name == "torch" and seen[-1][0] is out and seen[-1][1] == "torch"
            assert_close("out", out, attend(call.q, call.k, call.v, executor="reference", **asked).out)
    assert len(seen) == 6


def test_half_precision_keeps_the_factor() -> None:
    call = call_of(2, dtype=torch.bfloat16)
    bias, _ = as_bias(call, [Columns(slice(0, 1), VARIED, positive=True)])
    want = attend(call.q.float(), call.k.float(), call.v.float(), selection=None, scale=0.3, bias=bias).out
    assert_close("bfloat16", run(call, "torch", bias)[0].float(), want, 1e-2)
    assert_close("bfloat16", run_out(call, bias).float(), want, 1e-2)


def test_base_attention_gives_way_only_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_decode, "LONG", 80)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert beats_sdpa(call_of(1)) and not beats_sdpa(call_of(1, 79)) and not beats_sdpa(call_of(1, hkv=6))
    assert not beats_sdpa(call_of(1, hkv=1)) and beats_sdpa(call_of(2, hkv=1))
    assert not beats_sdpa(call_of(1, softcap=5.0)) and not beats_sdpa(call_of(1, sinks=torch.zeros(6)))
    learned = call_of(1)
    learned.q.requires_grad_()
    assert not beats_sdpa(learned)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "settings", [{"method": "zerotuning", "gamma": 3.0}, {"method": "gated"}], ids=["zerotuning", "gated"]
)
def test_decoding_is_the_same_without_it(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, 40)
    monkeypatch.setattr(torch_decode, "LONG", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def steps() -> tuple[Tensor, dict[str, int]]:
        with patched(model, **settings) as patch, torch.no_grad():
            cache = model(ids[:, :36], use_cache=True).past_key_values
            out = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(36, 40)]
            lines = [x for x in patch.report().lines if x.phase == "decode"]
            return torch.cat(out, 1), dict(lines[0].stats.executors)

    got, ran = steps()
    assert ran == {"torch": 4}
    general = replace(executors._EXECUTORS["torch"], run_out=None)
    monkeypatch.setitem(executors._EXECUTORS, "torch", general)
    monkeypatch.setattr("hfpatch.runtime.plans.beats_sdpa", lambda _: False)
    monkeypatch.setattr("hfpatch.runtime.plans.as_bias", lambda call, columns: (call.bias, columns))
    want, _ = steps()
    assert_close("logits", got, want)
