"""What a patch misses, sampled, against attention written out."""

import pickle
from typing import Any

import pytest
import torch
from test_invariants import built
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hfpatch import patched
from hfpatch.core.audit import Audit
from hfpatch.core.audit_report import Moments, Sample, Tally
from hfpatch.core.audit_tiles import tile_masses
from hfpatch.core.call import AttentionCall
from hfpatch.core.selection import BlockMap, Both, Causal, Predicate, Rows, Selection, SinkWindow
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


def attended(call: AttentionCall, selection: Selection) -> tuple[Tensor, Tensor]:
    more = {"softcap": call.softcap, "sinks": call.sinks, "bias": call.bias}
    done = attend(call.q, call.k, call.v, selection=selection, scale=call.scale, **more)
    return done.out, done.lse


def run(call: AttentionCall, selection: Selection, audit: Audit) -> None:
    audit.look(call, selection, *attended(call, selection))


@extras
@lengths
@pytest.mark.parametrize("name", ["window", "blocks", "tokens", "rule", "ranges"])
def test_all_rows_audited_equal_attention_written_out(extra: dict[str, Any], lq: int, name: str) -> None:
    call = call_of(lq, **extra)
    selection = selections(call)[name]
    sample = Audit(rows=1 << 20).sample(call, selection, *attended(call, selection))
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
        sink = 1 - mass.sum(-1)
        torch.testing.assert_close(kept.double(), (mass * keep[:, :, tile]).sum(-1) + sink, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(best.double(), want + sink, rtol=1e-4, atol=1e-5)
        assert bool((best >= kept - 1e-6).all())


def test_intervals_cover_the_truth() -> None:
    """Sixteen of 1024 queries, their mass far from evenly spread: 95 of 100 intervals hold the mean of all."""
    call = call_of(1024, lk=1024)
    selection, everything = SinkWindow(4, 64), Audit(rows=1 << 20, tiles=0)
    run(call, selection, everything)
    truth = everything.report().lines[0]
    hits = {"mass": 0, "error": 0}
    for seed in range(200):
        audit = Audit(rows=16, tiles=0, seed=seed)
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


def test_a_long_generation_is_no_more_to_keep() -> None:
    call, audit, sizes = call_of(1), Audit(), []
    selection = blocks(call, 2, 16, 8)
    out = attended(call, selection)
    for step in range(1, 201):
        audit.look(call, selection, *out)
        if step in (100, 200):
            sizes.append(len(pickle.dumps(audit.tallies)))
    assert audit.tallies[0, "decode"].calls == 200 and abs(sizes[1] - sizes[0]) < 16


def test_a_seed_names_the_same_queries_whatever_the_oracle_looks_at() -> None:
    call = call_of()
    selection = blocks(call, 2, 16, 8)
    out = attended(call, selection)
    audits = [Audit(rows=5, tiles=tiles, seed=seed) for tiles, seed in ((0, 1), (3, 1), (3, 2))]
    for audit in audits:
        for _ in range(3):
            audit.look(call, selection, *out)
    a, b, other = (audit.report().lines[0].mass for audit in audits)
    assert a == b != other


def test_calls_count_by_their_queries() -> None:
    """Four places for a hundred queries weigh as much as those hundred, not as the next call's four."""
    tally = Tally()
    few, many = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    tally.add(Sample(many, many * 2, torch.tensor([90, 60, 30, 1]), 200, many.mean((0, 1))[:2], torch.ones(2)))
    tally.add(Sample(few, few * 2, torch.arange(4), 8, few.mean((0, 1)), torch.ones(4)))
    want = (200 * many.mean() + 8 * few.mean()) / 208
    mass, error = tally.mass.estimate(), tally.error.estimate()
    assert mass.mean == pytest.approx(float(want)) and error.mean == pytest.approx(2 * float(want))
    assert tally.kept.estimate().mean == pytest.approx(
        float(200 * many.mean((0, 1))[:2].mean() + 8 * few.mean()) / 208
    )
    assert tally.heads is not None
    heads = (200 * many.mean((0, 2)) + 8 * few.mean((0, 2))) / 208
    torch.testing.assert_close(tally.heads / tally.mass.w, heads.double())
    assert tally.far[0].count + tally.far[1].count == 8 and tally.far[1].count == 1


def test_positions_alone_leave_nothing_to_choose() -> None:
    call = call_of()
    fixed = Rows([(50, Causal()), (LK, Both(SinkWindow(2, 9), Predicate(lambda h, i, j: (i - j) % 2 == 0)))])
    sample = Audit(rows=1 << 20).sample(call, fixed, *attended(call, fixed))
    assert sample.kept is sample.best
    torch.testing.assert_close(sample.kept, sample.mass.mean((0, 1)))


def test_the_tile_of_a_range_is_that_of_its_selection() -> None:
    """Tiles of 16 queries from query 50 on, after a window; each keeps what the mask written out keeps."""
    call = call_of()
    mixed = Rows([(50, SinkWindow(2, 9)), (LK, blocks(call, 2, 16, 8))])
    weights, mask = weights_of(call), mixed.mask(call.layout)
    for query, first, last in ((20, 20, 21), (49, 49, 50), (50, 50, 66), (80, 66, 82), (110, 98, 111)):
        kept, best = tile_masses(call, mixed, query)
        want = (weights * mask)[:, :, first:last].sum(-1).mean(-1).unflatten(1, (kept.shape[1], -1)).mean(-1)
        torch.testing.assert_close(kept.double(), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept, best) == (query < 50) and bool((best >= kept - 1e-6).all())


def test_an_oracle_shares_its_choice_among_heads_as_the_selection_does() -> None:
    call = call_of()
    one = Both(blocks(call, 1, 16, 8), SinkWindow(0, 40))
    own = Both(blocks(call, 4, 16, 8), SinkWindow(0, 40))
    assert tile_masses(call, one, 80)[1].shape == (2, 1) and tile_masses(call, own, 80)[1].shape == (2, 4)
    keep = one.mask(call.layout)[:, :, 80]
    mass = weights_of(call)[:, :, 80].mean(1, keepdim=True)
    best = torch.stack(
        [m[0].sort(descending=True).values[: int(k.sum())].sum() for m, k in zip(mass, keep, strict=True)]
    )
    torch.testing.assert_close(tile_masses(call, one, 80)[1][:, 0].double(), best, rtol=1e-4, atol=1e-5)


def test_a_rule_is_asked_for_one_query_only() -> None:
    call, seen = call_of(), []

    def rule(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen.append(i.numel() * j.numel())
        return (i - j) % 3 == 0

    tile_masses(call, Both(Predicate(rule), blocks(call, 2, 16, 8)), 80)
    assert seen == [81]


def test_an_estimate_of_one_has_no_interval() -> None:
    moments = Moments()
    moments.add(torch.tensor([0.5]), 3.0)
    assert str(moments.estimate()) == "0.500"


def test_moments_give_students_interval() -> None:
    moments = Moments()
    for part in ([1.0], [2.0, 3.0], [4.0]):
        moments.add(torch.tensor(part), 2.5)
    known = moments.estimate()
    assert abs(known.high - (2.5 + 3.182446 * 1.290994 / 2)) < 1e-5 and known.to_dict()["count"] == 4
    assert moments.estimate(3.0).high == 3.0


def test_a_cropped_cache_is_not_taken_for_all_there_was() -> None:
    """Whether a step's choice or the kept keys alone say what is seen: what was dropped is missing from both."""
    settings = {"sparse_layers": "1-", "sparse_settings": {"sink": 2, "window": 8}, "crop_cache": True}
    model, ids = built("llama"), torch.arange(40)[None] % 50 + 3
    with torch.no_grad(), patched(model, "flux", **settings) as patch, patch.audit() as audit:
        cache = DynamicCache(config=model.config)
        for part in (ids[:, :38], ids[:, 38:39], ids[:, 39:]):
            model(part, past_key_values=cache)
    sparse = model.config.num_hidden_layers - 1
    assert {phase for _, phase in audit.tallies} == {"prefill"}
    assert f"{2 * sparse} calls were not audited, as their cache had dropped keys" in str(audit.report())
