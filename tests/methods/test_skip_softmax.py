"""`skip_softmax` against its plain-loop definition."""

import math

import pytest
import torch
from method_calls import DECODES, SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import skip_softmax

from hfpatch.methods import skip_softmax as module

ALL = {**SHAPES, **DECODES}


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", ALL)
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_equals_the_formula(shape, share, softcap):
    call = make_call(ALL[shape], dv=24, softcap=softcap)
    method = make_method(
        "skip_softmax", min_length=0, prefill=0.2, decode=0.2, block_q=4, block_k=8, head_sharing=share
    )
    keep = chosen_mask(method, call)
    assert torch.equal(keep, skip_softmax(call, 0.2, 4, 8, share))
    check_executors(method, call)


@pytest.mark.parametrize("shape", ALL)
def test_lambda_zero_is_dense(shape):
    call = make_call(ALL[shape])
    keep = chosen_mask(make_method("skip_softmax", min_length=0, prefill=0.0, decode=0.0, block_q=16), call)
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    assert torch.equal(keep, want.expand_as(keep))


def test_chunking_changes_nothing(monkeypatch):
    call = make_call(SHAPES["L257-mqa8"])
    method = make_method("skip_softmax", min_length=0, prefill=0.1, block_q=16, block_k=16)
    want = chosen_mask(method, call)
    monkeypatch.setattr(module, "CHUNK_ROWS", 1)
    monkeypatch.setattr(module, "CHUNK_KEYS", 32)
    assert torch.equal(chosen_mask(method, call), want)


def test_threshold_scales_with_the_length():
    method = make_method("skip_softmax", prefill_scale=8.0, decode_scale=4.0)
    assert method.threshold(make_call((1, 2, 2, 64, 64))) == pytest.approx(math.log(1 / 8))
    assert method.threshold(make_call((1, 2, 2, 1, 64))) == pytest.approx(math.log(1 / 16))
    assert method.threshold(make_call((1, 2, 2, 4, 4))) == 0.0


def test_skipped_mass_is_bounded():
    """A skipped key weighs at most lambda relative to the row's largest weight."""
    call = make_call(SHAPES["L257-mqa8"])
    keep = chosen_mask(make_method("skip_softmax", min_length=0, prefill=0.05, block_q=4, block_k=8), call)
    k = call.k.repeat_interleave(call.groups, 1)
    causal = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril()
    logits = (call.scale * call.q @ k.mT).masked_fill(~causal, -torch.inf)
    ratio = (logits - logits.amax(-1, keepdim=True)).exp()
    assert not keep.all() and float(ratio[~keep & causal].max()) <= 0.05 * (1 + 1e-5)
