"""`xattention` against its plain-loop definition."""

import pytest
import torch
from method_calls import SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import xattention

from hfpatch.errors import ConfigError
from hfpatch.methods import xattention as module

SMALL = {"L63-mha": (1, 4, 4, 63, 63), "L111-gqa4": (2, 8, 2, 111, 111), "chunk50of161": (1, 4, 2, 50, 161)}


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("share", ["group", "head", "all"])
def test_equals_the_formula(shape, share):
    call = make_call(SMALL[shape], dv=24)
    for bq, bk in [(16, 16), (32, 8), (8, 16)]:
        own = dict(top_p=0.7, stride=4, block_q=bq, block_k=bk, sink_blocks=1, window_blocks=1, head_sharing=share)
        method = make_method("xattention", min_length=0, **own)
        assert torch.equal(chosen_mask(method, call), xattention(call, **own))
        check_executors(method, call)


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_all_is_dense(shape, monkeypatch):
    call = make_call(SHAPES[shape])
    keep = chosen_mask(make_method("xattention", min_length=0, stride=8, block_q=16, block_k=8, top_p=1.0), call)
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    assert torch.equal(keep, want.expand_as(keep))


def test_chunking_changes_nothing(monkeypatch):
    call = make_call(SHAPES["L257-mqa8"])
    method = make_method("xattention", min_length=0, stride=4, block_q=16, block_k=16, top_p=0.6)
    want = chosen_mask(method, call)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert torch.equal(chosen_mask(method, call), want)


def test_budget_caps_the_choice():
    call = make_call(SHAPES["L257-mqa8"])
    method = make_method("xattention", min_length=0, stride=4, block_q=16, block_k=16, budget=64)
    assert int(method.select(call).counts.max()) == 4


def test_stride_must_divide():
    with pytest.raises(ConfigError, match="must divide"):
        make_method("xattention", stride=24)
