"""`expected`: its scores against the formula with explicit rotations, and what it makes of models' positions."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import zoo
from eviction_helpers import recorded, told
from method_calls import make_call, make_method
from test_evicting import plain_set
from test_invariants import built
from torch import Tensor

from hfpatch import UnsupportedModelError
from hfpatch.core.call import AttentionCall, Held

SETTINGS: dict[str, Any] = {"budget": 30, "sink": 3, "window": 8, "interval": 4, "future": 20}
BASE, DIM = 10000.0, 16


def turned(x: Tensor, position: int) -> Tensor:
    """`x [..., D]` in float64 turned as Llama does, each half's channels with the other's."""
    half = x.shape[-1] // 2
    angle = position * BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x.double().split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def call_of(shape: tuple[int, int, int, int, int], start: int = 0) -> AttentionCall:
    """A call whose queries and keys are turned by their places, counted from `start`."""
    call = make_call(shape, dim=DIM, dv=24)
    places = range(start, start + call.Lk)
    q = torch.stack([turned(call.q[:, :, n], places[call.off + n]) for n in range(call.Lq)], 2).float()
    k = torch.stack([turned(call.k[:, :, n], places[n]) for n in range(call.Lk)], 2).float()
    held = Held(call.Hkv, lambda: k, lambda: None, start)
    return dataclasses.replace(call, q=q, k=k, q_pre_rope=call.q.transpose(1, 2), held=held, scale=0.2)


def formula(
    call: AttentionCall, row: int, kv: int, first: int, covariance: bool, start: int = 0, turns: bool = True
) -> list[float]:
    """The published score of every key; queries from number `first` of the call on stand for those to come."""
    groups, steps = call.Hq // call.Hkv, range(start + call.Lk, start + call.Lk + 20)
    rotation = sum(turned(torch.eye(DIM), p) for p in steps).mT / len(steps)  # columns are turned unit vectors
    rotation = rotation if turns else torch.eye(DIM, dtype=torch.float64)
    total = [0.0] * call.Lk
    for head in range(kv * groups, (kv + 1) * groups):
        q = call.q_pre_rope[row, first:, head].double()
        mean, spread = q.mean(0), torch.cov(q.mT, correction=0)
        z = []
        for key in call.k[row, kv].double():
            value = 0.2 * (rotation @ mean) @ key
            value += 0.2**2 / 2 * key @ rotation @ spread @ rotation.mT @ key if covariance else 0.0
            z.append(float(value))
        norm = sum(math.exp(x) for x in z[3:])
        for j in range(3, call.Lk):
            total[j] += math.exp(z[j]) / norm / groups * float(call.v[row, kv, j].double().norm())
    return total


def method_for(**settings: Any) -> Any:
    method = make_method("expected", **{**SETTINGS, **settings})
    method.prepare(built("llama"), [0, 1, 2])
    return method


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("start", [0, 9])
def test_equals_the_formula(start: int, covariance: bool) -> None:
    call = call_of((2, 4, 2, 60, 60), start)
    got = method_for(covariance=covariance).retain(call).index
    for row, kv in ((0, 0), (1, 1)):
        assert got[row, kv].tolist() == plain_set(formula(call, row, kv, 3, covariance, start), 30, 3, 8)


def test_decode_steps_go_by_their_last_queries() -> None:
    whole, states = call_of((1, 4, 2, 50, 50)), {}
    method = method_for(evict="decode", queries=5)
    for stop in range(30, 35):
        seen = stop - 1 if stop > 30 else 0
        call = dataclasses.replace(whole.first(stop), rows=(0,), states=states, held=whole.held)
        q, before = call.q[:, :, seen:], call.q_pre_rope[:, seen:]
        answer = method.retain(dataclasses.replace(call, q=q, q_pre_rope=before))
        assert (answer is None) == (stop < 34)
        if stop == 34:
            assert answer.index[0, 1].tolist() == plain_set(formula(call, 0, 1, 29, True), 30, 3, 8)


def test_queries_that_do_not_turn_so_are_refused_and_layers_without_positions_served() -> None:
    call = call_of((1, 4, 2, 60, 60))
    odd = dataclasses.replace(call, q_pre_rope=call.q_pre_rope.flip(-1))
    with pytest.raises(UnsupportedModelError, match="do not turn"):
        method_for().retain(odd)
    with pytest.raises(UnsupportedModelError, match="no queries before RoPE"):
        method_for().retain(dataclasses.replace(call, q_pre_rope=None))
    still = dataclasses.replace(call, q=call.q_pre_rope.transpose(1, 2))
    want = plain_set(formula(still, 0, 1, 3, True, turns=False), 30, 3, 8)
    assert method_for().retain(still).index[0, 1].tolist() == want


@pytest.mark.parametrize("name", [n for n in ("qwen3", "gemma3_text", "gpt_oss", "smollm3") if n in zoo.SUPPORTED])
def test_models_turn_queries_as_their_own_module_does(name: str) -> None:
    model = built(name)
    with recorded(model, "expected", **SETTINGS) as (patch, log):
        told(model, zoo.prompt(model, 2, 50), [0, 50])
    assert len(log) == len(patch.layers)
