"""`flash_prefill` against its plain-loop definition."""

import pytest
import torch
from oracles import SHAPES, check_executors, chosen_mask, flash_prefill, make_call, make_method

from hfpatch.methods import flash_prefill as module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("budget", [None, 64])
def test_equals_the_formula(shape, share, budget):
    call = make_call(SHAPES[shape], dv=24)
    for bq, bk in [(16, 16), (32, 8), (8, 16)]:
        own = dict(alpha=0.5, block_q=bq, block_k=bk, sink=1, window=2, last_blocks=1, share=share, budget=budget)
        method = make_method("flash_prefill", min_length=0, **own)
        assert torch.equal(chosen_mask(method, call), flash_prefill(call, **own))
        check_executors(method, call)


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_zero_is_dense(shape):
    call = make_call(SHAPES[shape])
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    keep = chosen_mask(make_method("flash_prefill", min_length=0, block_q=16, block_k=16, alpha=0.0), call)
    assert torch.equal(keep, want.expand_as(keep))


def test_chunking_changes_nothing(monkeypatch):
    call = make_call(SHAPES["L257-mqa8"])
    method = make_method("flash_prefill", min_length=0, block_q=16, block_k=16, alpha=0.4, last_blocks=0)
    want = chosen_mask(method, call)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert torch.equal(chosen_mask(method, call), want)


def test_short_calls_are_dense():
    call = make_call(SHAPES["L257-mqa8"])
    assert make_method("flash_prefill").select(call) is None
    assert make_method("flash_prefill", min_length=0, block_q=128, last_blocks=3).select(call) is None
