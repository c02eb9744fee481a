"""Decode steps in one kernel call equal the general way, and are left where they do not serve."""

from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built
from torch import Tensor

from hfpatch import patched
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns, regroup
from hfpatch.ops import attend
from hfpatch.ops import torch_decode as module
from hfpatch.ops.torch_decode import one_query, serves


def call_of(batch: int, lk: int = 90, dtype: torch.dtype = torch.float32, **kwargs: Any) -> AttentionCall:
    torch.manual_seed(0)
    q = torch.randn(batch, 6, 1, 16, dtype=dtype)
    k, v = torch.randn(2, batch, 2, lk, 16, dtype=dtype)
    rows = tuple(range(batch))
    return AttentionCall(layer=0, num_layers=1, phase="decode", q=q, k=k, v=v, scale=0.3, rows=rows, **kwargs)


def first(factor: Tensor) -> list[Columns]:
    return [Columns(slice(0, 1), factor, positive=True)]


SAME, VARIED = torch.full((6,), 3.0), torch.tensor([0.001, 0.5, 1.0, 2.0, 8.0, 100.0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("factor", [None, SAME, VARIED], ids=["dense", "same", "varied"])
def test_equals_attend_and_regroup(batch: int, factor: Tensor | None) -> None:
    columns = [] if factor is None else first(factor)
    for lk in (90, 91, 3000, 1):  # the mask is cut from a buffer that grows
        call = call_of(batch, lk)
        done = attend(call.q, call.k, call.v, selection=None, scale=call.scale, executor="reference")
        want = regroup(call, done.out, done.lse, columns, None)[0] if columns else done.out
        assert serves(call, columns)
        got = one_query(call, columns)
        assert got.shape == want.shape
        assert_close(f"{lk} keys", got, want)


def test_half_precision_keeps_the_factor() -> None:
    call, columns = call_of(2, dtype=torch.bfloat16), first(VARIED)
    wide = call_of(2)
    wide.q, wide.k, wide.v = (t.float() for t in (call.q, call.k, call.v))
    assert_close("bfloat16", one_query(call, columns).float(), one_query(wide, columns), 1e-2)


def test_left_to_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = first(SAME)
    assert serves(call_of(1), columns)
    assert not serves(call_of(1, dtype=torch.float64), columns)
    assert not serves(call_of(1, softcap=5.0), [])
    assert not serves(call_of(1, sinks=torch.zeros(6)), [])
    assert not serves(call_of(1), columns * 2)
    assert not serves(call_of(1), [Columns(slice(1, 2), SAME, positive=True)])
    learned = call_of(1)
    learned.q.requires_grad_()
    assert not serves(learned, [])
    monkeypatch.setattr(module, "MASKED", 80)
    assert not serves(call_of(1), columns) and serves(call_of(1), [])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "settings", [{"method": "zerotuning", "gamma": 3.0}, {"method": "gated"}], ids=["zerotuning", "gated"]
)
def test_decoding_is_the_same_without_it(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, 40)
    monkeypatch.setattr(module, "LONG", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def steps() -> tuple[Tensor, dict[str, int]]:
        with patched(model, **settings) as patch, torch.no_grad():
            cache = model(ids[:, :36], use_cache=True).past_key_values
            out = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(36, 40)]
            lines = [x for x in patch.report().lines if x.phase == "decode"]
            return torch.cat(out, 1), dict(lines[0].stats.executors)

    got, ran = steps()
    assert ran == {"torch": 4}
    monkeypatch.setattr("hfpatch.runtime.pipeline.serves", lambda *_: False)
    monkeypatch.setattr("hfpatch.runtime.pipeline.beats_sdpa", lambda *_: False)
    want, _ = steps()
    assert_close("logits", got, want)
