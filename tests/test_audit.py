"""What a patch misses, sampled, against attention written out."""

from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import acts_on, built, logits, tree
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hfpatch import ConfigError, get_patch, patch_model, patched
from hfpatch.core.audit import Audit, tile_masses
from hfpatch.core.audit_report import Estimate
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import BlockMap, Causal, Predicate, Rows, Selection, SinkWindow
from hfpatch.ops import attend

LK = 111
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "bias": {"bias": torch.linspace(-1, 1, LK).repeat(1, 4, 1)},
}
extras = pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
lengths = pytest.mark.parametrize("lq", [LK, 63, 1])


def call_of(lq: int = LK, hkv: int = 2, lk: int = LK, **extra: Any) -> AttentionCall:
    q = torch.randn(2, 4, lq, 16) * 2
    k, v = torch.randn(2, hkv, lk, 16), torch.randn(2, hkv, lk, 24)
    return AttentionCall(0, 1, "decode" if lq == 1 else "prefill", q, k, v, 0.3, **extra)


def weights_of(call: AttentionCall) -> Tensor:
    """Dense attention weights `[B, Hq, Lq, Lk]` in float64."""
    s = call.scale * call.q.double() @ call.k.double().repeat_interleave(call.groups, 1).mT
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias.double()[:, :, None]
    s = s.masked_fill(call.k_pos > call.q_pos[:, None], -torch.inf)
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s.softmax(-1)[..., : call.Lk]


def blocks(call: AttentionCall, heads: int, block_q: int, block_k: int) -> BlockMap:
    nq, nk = -(-call.Lq // block_q), -(-call.Lk // block_k)
    order = torch.rand(2, heads, nq, nk).argsort(-1)
    return BlockMap(order, torch.randint(1, nk, (2, heads, nq)), block_q, block_k)


def selections(call: AttentionCall) -> dict[str, Selection]:
    return {
        "window": SinkWindow(2, 9),
        "blocks": blocks(call, 2, 16, 8),
        "tokens": blocks(call, 4, 8, 1),
        "rule": Predicate(lambda h, i, j: (i - j) % 3 == h % 3),
        "ranges": Rows([(call.Lq // 2, SinkWindow(1, 5)), (call.Lq, Causal())]),
    }


def run(call: AttentionCall, selection: Selection, audit: Audit) -> None:
    more = {"softcap": call.softcap, "sinks": call.sinks, "bias": call.bias}
    done = attend(call.q, call.k, call.v, selection=selection, scale=call.scale, **more)
    audit.look(call, selection, done.out, done.lse)


@extras
@lengths
@pytest.mark.parametrize("name", ["window", "blocks", "tokens", "rule", "ranges"])
def test_all_rows_audited_equal_attention_written_out(extra: dict[str, Any], lq: int, name: str) -> None:
    call = call_of(lq, **extra)
    selection, audit = selections(call)[name], Audit(rows=1 << 20)
    run(call, selection, audit)
    (sample,) = audit.samples[0, call.phase]
    weights = weights_of(call)
    keep = selection.mask(call.layout) & (call.k_pos <= call.q_pos[:, None])
    kept = (weights * keep).sum(-1)
    sink = 1 - weights.sum(-1)  # what goes to a sink logit is never lost
    torch.testing.assert_close(sample.mass.double(), kept + sink, rtol=1e-4, atol=1e-5)
    v = call.v.double().repeat_interleave(call.groups, 1)
    dense, sparse = weights @ v, (weights * keep) @ v / (kept + sink)[..., None].clamp_min(1e-30)
    error = (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)
    torch.testing.assert_close(sample.error.double(), error, rtol=1e-3, atol=1e-4)
    assert torch.equal(sample.distance, torch.arange(lq - 1, -1, -1))


@extras
@lengths
@pytest.mark.parametrize("heads,block_q,block_k", [(1, 16, 8), (2, 8, 16), (4, 8, 1), (2, 1 << 10, 4)])
def test_the_oracle_is_the_best_choice_of_as_many_blocks(
    extra: dict[str, Any], lq: int, heads: int, block_q: int, block_k: int
) -> None:
    call = call_of(lq, **extra)
    selection, weights = blocks(call, heads, block_q, block_k), weights_of(call)
    keep = selection.block_mask(call.layout)
    for query in {0, lq // 2, lq - 1}:
        kept, best = tile_masses(call, selection, query)
        assert kept is not None and best is not None
        tile = query // block_q
        rows = weights[:, :, tile * block_q : (tile + 1) * block_q].mean(2)
        mass = torch.stack([part.sum(-1) for part in rows.split(block_k, -1)], -1)
        mass = mass.unflatten(1, (heads, -1)).mean(2)
        seen = -(-(call.off + min((tile + 1) * block_q, lq)) // block_k)
        count = keep[:, :, tile, :seen].sum(-1)
        want = torch.stack([
            torch.stack([m.sort(descending=True).values[:n].sum() for m, n in zip(row, counts, strict=True)])
            for row, counts in zip(mass, count.tolist(), strict=True)
        ])  # fmt: skip
        torch.testing.assert_close(kept.double(), (mass * keep[:, :, tile]).sum(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(best.double(), want, rtol=1e-4, atol=1e-5)
        assert bool((best >= kept - 1e-6).all())


def test_intervals_cover_the_truth() -> None:
    """Sixteen of 1024 queries, their mass far from evenly spread: 95 of 100 intervals hold the mean of all."""
    call = call_of(1024, lk=1024)
    selection, everything = SinkWindow(4, 64), Audit(rows=1 << 20, oracle=False)
    run(call, selection, everything)
    truth = everything.report().lines[0]
    hits = {"mass": 0, "error": 0}
    for seed in range(200):
        audit = Audit(rows=16, oracle=False, seed=seed)
        run(call, selection, audit)
        line = audit.report().lines[0]
        for name in hits:
            found, true = getattr(line, name), getattr(truth, name)
            hits[name] += found.low <= true.mean <= found.high
    assert min(hits.values()) >= 190


def test_the_cost_is_that_of_few_rows() -> None:
    """At 8k tokens 16 rows and a tile of 128 take at most 5 % of what causal attention multiplies."""
    call = call_of(8192, lk=8192)
    selection = blocks(call, 2, 128, 64)
    out, lse = torch.randn(2, 8192, 4, 24), torch.randn(2, 4, 8192)
    with FlopCounterMode(display=False) as counter:
        Audit(rows=16).look(call, selection, out, lse)
    dense = 2 * call.layout.visible * (16 + 24)
    assert 0 < counter.get_total_flops() <= 0.05 * dense


MODELS = ["llama", "gemma2", "gpt_oss"]
PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in MODELS
    for case in METHODS
    if acts_on(zoo.SUPPORTED[name], case)
]


@pytest.mark.parametrize("name,case", PAIRS)
def test_an_audit_changes_nothing_and_fits_the_report(name: str, case: MethodCase) -> None:
    model = built(name)
    ids, mask = zoo.left_pad(zoo.prompt(model, 3, 63), [63, 40, 25])
    with patched(model, case.name, **case.settings) as patch:
        before = tree(model)
        want = logits(model, ids, attention_mask=mask)
        with patch.audit(rows=8) as audit:
            assert torch.equal(logits(model, ids, attention_mask=mask), want)
        assert tree(model) == before
        once = audit.report().to_dict()
        logits(model, ids, attention_mask=mask)
        assert audit.report().to_dict() == once
        lines = audit.report().lines
        sparse = {line.layer for line in patch.report().lines if line.stats.density < 1}
        assert {x.layer for x in lines} >= sparse
        for line in lines:
            assert 0 < line.mass.mean <= 1 + 1e-5 and line.mass.low <= line.mass.mean <= line.mass.high
            assert (line.kept is None) == (line.best is None)
            if line.kept is not None and line.best is not None:
                assert line.kept.mean <= line.best.mean + 1e-5
        assert str(audit.report())


def test_padded_rows_are_audited_as_rows_alone() -> None:
    model = built("llama")
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 63), [63, 40])
    with patched(model, "streaming", sink=2, window=8, layers=0) as patch:
        with patch.audit(rows=99) as together:
            logits(model, ids, attention_mask=mask)
        with patch.audit(rows=99) as alone:
            logits(model, ids[:1])
            logits(model, ids[1:, 23:])
    for a, b in zip(together.samples[0, "prefill"], alone.samples[0, "prefill"], strict=True):
        torch.testing.assert_close(a.mass, b.mass, rtol=1e-4, atol=1e-5)


def test_dense_calls_are_counted_and_lose_nothing() -> None:
    model = built("llama")
    with patched(model, "zerotuning", gamma=2.0) as patch, patch.audit() as audit:
        logits(model, zoo.prompt(model, 1, 40))
    assert audit.dense == {(n, "prefill"): 1 for n in patch.layers} and not audit.samples
    assert "all calls seen were dense" in str(audit.report())


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "16", None])
def test_rows_that_are_no_number_of_queries(rows: Any) -> None:
    patch = get_patch(patch_model(zoo.SUPPORTED["llama"].build(), "streaming"))
    with pytest.raises(ConfigError, match=r"rows=.*1 or more"), patch.audit(rows=rows):
        pass


def test_an_estimate_of_one_has_no_interval() -> None:
    assert str(Estimate.of(torch.tensor([0.5]))) == "0.500"
    known = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert abs(known.high - (2.5 + 3.182446 * 1.290994 / 2)) < 1e-5 and known.to_dict()["count"] == 4
