"""`flash_prefill` against its plain-loop definition."""

from dataclasses import replace

import pytest
import torch
from method_calls import SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import blocks_of, flash_prefill, kv
from tiny_llama import tiny_model

from hfpatch import patched
from hfpatch.config.registry import make_config
from hfpatch.methods import flash_prefill as module
from hfpatch.ops import attend


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("budget", [None, 64, 0.3])
def test_equals_the_formula(shape, share, budget):
    call = make_call(SHAPES[shape], dv=24)
    for bq, bk in [(16, 16), (32, 8), (8, 16)]:
        own = dict(
            alpha=0.5,
            block_q=bq,
            block_k=bk,
            sink_blocks=1,
            window_blocks=2,
            last_blocks=1,
            head_sharing=share,
            budget=budget,
            floor=40,
        )
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


def corrected(call, method):
    """Output `[B, Lq, Hq, Dv]` and lse with the method's `output` point, as the pipeline calls it."""
    call.selection = method.select(call)
    done = attend(
        call.q, call.k, call.v, selection=call.selection, scale=call.scale, softcap=call.softcap, sinks=call.sinks
    )
    call.lse = done.lse
    changed = method.output(call, done.out)
    return changed if isinstance(changed, tuple) else (changed, done.lse)


def mean_oracle(call, keep, size):
    """Per query: its kept keys, and each wholly past block without a kept key as `size` copies of its means."""
    out, lse = torch.zeros(call.B, call.Lq, call.Hq, call.v.shape[-1]), torch.zeros(call.B, call.Hq, call.Lq)
    for b in range(call.B):
        for h in range(call.Hq):
            k, v = call.k[b, kv(call, h)], call.v[b, kv(call, h)]
            for i in range(call.Lq):
                keys, values = [k[keep[b, h, i]]], [v[keep[b, h, i]]]
                for block in blocks_of(call, size):
                    if block[-1] <= call.off + i and len(block) == size and not keep[b, h, i, block].any():
                        keys.append(k[block].mean(0).expand(size, -1))
                        values.append(v[block].mean(0).expand(size, -1))
                logits = call.scale * torch.cat(keys) @ call.q[b, h, i]
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                if call.sinks is not None:
                    logits = torch.cat([logits, call.sinks[h : h + 1]])
                    values.append(torch.zeros(1, v.shape[-1]))
                out[b, i, h], lse[b, h, i] = logits.softmax(0) @ torch.cat(values), logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("shape", [(1, 4, 2, 45, 45), (2, 2, 1, 23, 61)])
@pytest.mark.parametrize(
    ("share", "extra"),
    [("group", {}), ("head", {}), ("all", {"softcap": 2.0}), ("group", {"sinks": torch.linspace(-1, 1, 4)})],
)
def test_mean_correction_equals_the_formula(shape, share, extra, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 10)
    extra = {n: x[: shape[1]] if n == "sinks" else x for n, x in extra.items()}
    call = make_call(shape, dv=24, **extra)
    for bq, bk, last_blocks in [(8, 4, 1), (4, 8, 0)]:
        own = dict(
            block_q=bq,
            block_k=bk,
            alpha=1.0,
            sink_blocks=1,
            window_blocks=1,
            last_blocks=last_blocks,
            head_sharing=share,
        )
        method = make_method("flash_prefill", min_length=0, mean_correction=True, **own)
        keep = chosen_mask(method, call)
        assert int(keep.sum()) < 0.9 * call.layout.visible
        want, want_lse = mean_oracle(call, keep, bk)
        out, lse = corrected(call, method)
        assert (out - want).norm() <= 1e-5 * want.norm()
        assert (lse - want_lse).norm() <= 1e-5 * want_lse.norm()


def test_mean_correction_is_dense_on_constant_blocks():
    call = make_call((1, 4, 2, 128, 128))
    call = replace(call, **{n: getattr(call, n)[:, :, ::16].repeat_interleave(16, 2) for n in ("k", "v")})
    own = dict(min_length=0, block_q=16, block_k=16, alpha=1.0, sink_blocks=0, window_blocks=1, last_blocks=0)
    want = attend(call.q, call.k, call.v, selection=None, scale=call.scale)
    out, lse = corrected(call, make_method("flash_prefill", mean_correction=True, **own))
    assert (out - want.out).norm() <= 1e-5 * want.out.norm() and (lse - want.lse).norm() <= 1e-5 * want.lse.norm()
    plain, _ = corrected(call, make_method("flash_prefill", **own))
    assert (plain - want.out).norm() > 0.1 * want.out.norm()


def test_mean_correction_in_a_model():
    """It acts in the layer call, keeps padded rows right, and steps aside when another method narrows the call."""
    model, ids = tiny_model(), torch.arange(5, 105)[None]
    own = dict(min_length=0, block_q=8, block_k=8, alpha=1.0, sink_blocks=0, window_blocks=1, last_blocks=0)
    means = make_config("flash_prefill", {"mean_correction": True, **own})

    def logits(methods, **inputs):
        with torch.no_grad(), patched(model, methods):
            return model(**{"input_ids": ids, **inputs}).logits

    got, without = logits(means), logits(make_config("flash_prefill", own))
    assert (got - without).abs().max() > 1e-4
    padded = torch.cat([torch.full((1, 7), 2), ids], 1)
    mask = (torch.arange(107) >= 7).long()[None]
    assert (logits(means, input_ids=padded, attention_mask=mask)[:, 7:] - got).abs().max() < 1e-4
    narrow = make_config("pattern", {"block": 8})
    both, plain = logits([means, narrow]), logits([make_config("flash_prefill", own), narrow])
    assert torch.equal(both, plain)


def test_short_calls_are_dense():
    call = make_call(SHAPES["L257-mqa8"])
    assert make_method("flash_prefill").select(call) is None
    assert make_method("flash_prefill", min_length=0, block_q=128, last_blocks=3).select(call) is None
