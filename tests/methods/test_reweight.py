"""Reweighting from (out, lse) against a float64 softmax that is reweighted in the open."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns, initial_weight, reweight
from hfpatch.core.selection import SinkWindow
from hfpatch.ops import attend

LK = 63


def make_call(
    lq: int = LK, hq: int = 4, hkv: int = 2, dtype: torch.dtype = torch.float32, **extra: Any
) -> AttentionCall:
    q = torch.randn(2, lq, hq, 16, dtype=dtype).transpose(1, 2) * 2
    k, v = torch.randn(2, hkv, LK, 16, dtype=dtype), torch.randn(2, hkv, LK, 24, dtype=dtype)
    phase = "prefill" if lq == LK else "decode" if lq == 1 else "chunk"
    return AttentionCall(0, 1, phase, q, k, v, 0.3, **extra)


def weights_of(call: AttentionCall, selection: Any = None) -> Tensor:
    """Softmax weights `[B, Hq, Lq, Lk]` in float64, sinks in the denominator."""
    k = call.k.double().repeat_interleave(call.groups, 1)
    s = call.scale * call.q.double() @ k.mT
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias.double()[:, :, None]
    keep = call.k_pos <= call.q_pos[:, None]
    if selection is not None:
        keep = keep & selection.mask(call.layout)
    s = s.masked_fill(~keep, -torch.inf)
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s.softmax(-1)[..., :LK]


def values(call: AttentionCall, weights: Tensor) -> Tensor:
    return (weights @ call.v.double().repeat_interleave(call.groups, 1)).transpose(1, 2)


def rescaled(weights: Tensor, keys: Any, factor: Any, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Weights with columns times the factor, renormalised together with `rest [B, Hq, Lq]`, the sink's share."""
    new = weights.clone()
    new[..., keys] = new[..., keys] * factor
    total = new.sum(-1) + rest
    return new / total[..., None], rest / total


def run(call: AttentionCall, groups: list[Columns], selection: Any = None) -> tuple[Tensor, Tensor]:
    done = attend(
        call.q,
        call.k,
        call.v,
        selection=selection,
        scale=call.scale,
        softcap=call.softcap,
        sinks=call.sinks,
        bias=call.bias,
    )
    return reweight(call, done.out, done.lse, groups, selection)


EXTRAS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "bias": {"bias": torch.linspace(-1, 1, LK).repeat(1, 4, 1)},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lq", [LK, 7, 1])
@pytest.mark.parametrize("selection", [None, SinkWindow(2, 8)], ids=["dense", "window"])
def test_groups_of_columns(lq: int, extra: dict[str, Any], selection: Any) -> None:
    call = make_call(lq, **extra)
    per_head = torch.tensor([0.2, 1.0, 3.0, 7.0])
    groups = [Columns(slice(0, 1), per_head), Columns(torch.tensor([5, 58, 60]), 0.1)]
    out, lse = run(call, groups, selection)
    weights = weights_of(call, selection)
    rest = 1 - weights.sum(-1)
    weights, rest = rescaled(weights, [0], per_head.double()[:, None, None], rest)
    weights, rest = rescaled(weights, [5, 58, 60], 0.1, rest)
    torch.testing.assert_close(out.double(), values(call, weights), rtol=1e-5, atol=1e-5)
    probe = Columns(slice(0, LK), 1.0)
    again = reweight(call, out, lse, [probe], selection)[0]
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-5)


def test_shared_columns_are_multiplied_in_order() -> None:
    call = make_call()
    per_head = torch.tensor([0.2, 1.0, 3.0, 7.0])
    groups = [Columns(slice(0, 2), per_head), Columns(torch.tensor([1, 4]), 0.5), Columns(slice(0, 1), 3.0)]
    weights, rest = weights_of(call), torch.zeros(2, 4, LK).double()
    for keys, factor in (([0, 1], per_head.double()[:, None, None]), ([1, 4], 0.5), ([0], 3.0)):
        weights, rest = rescaled(weights, keys, factor, rest)
    torch.testing.assert_close(run(call, groups)[0].double(), values(call, weights), rtol=1e-5, atol=1e-5)


def test_a_factor_may_depend_on_the_weights() -> None:
    call = make_call()
    keys = torch.tensor([3, 9])
    out, _ = run(call, [Columns(keys, lambda w: 1 + w.sum(-1, keepdim=True))])
    weights = weights_of(call)
    factor = 1 + weights[..., [3, 9]].sum(-1, keepdim=True)
    expected = values(call, rescaled(weights, [3, 9], factor, torch.zeros(2, 4, LK).double())[0])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_factor_one_keeps_the_output() -> None:
    call = make_call()
    done = attend(call.q, call.k, call.v, selection=None, scale=call.scale)
    out, lse = reweight(call, done.out, done.lse, [Columns(slice(0, 1), torch.ones(4))], None)
    assert torch.equal(out, done.out) and torch.equal(lse, done.lse)


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lq", [LK, 7, 1])
def test_initial_weight(lq: int, extra: dict[str, Any]) -> None:
    call = make_call(lq, **extra)
    got = initial_weight(call, queries=1 << 20)
    torch.testing.assert_close(got.double(), weights_of(call)[:, :, lq // 2 :, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_little_left_keeps_its_digits(extra: dict[str, Any]) -> None:
    """Where a factor takes nearly all of a query's weight, what remains is a difference of close numbers."""
    call = make_call(**extra)
    call.k[:, :, 4] = 1.2 * call.q[:, ::2, 30]
    factor = torch.tensor([0.0, 1e-6, 1e-3, 1.0])
    out, lse = run(call, [Columns(torch.tensor([4]), factor), Columns(slice(0, 2), 0.5)])
    weights = weights_of(call)
    assert weights[:, 0, 30, 4].min() > 0.99 or call.softcap
    rest = 1 - weights.sum(-1)
    weights, rest = rescaled(weights, [4], factor.double()[:, None, None], rest)
    weights, rest = rescaled(weights, [0, 1], 0.5, rest)
    torch.testing.assert_close(out.double(), values(call, weights), rtol=2e-5, atol=2e-5)
    assert lse.isfinite().all()
