"""DHSA: the chosen tokens against plain loops, boundaries against brute force, budgets, chunked prefill, decode."""

import math
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from hfpatch import ConfigError, get_method, patched
from hfpatch.core.call import AttentionCall, Forward
from hfpatch.core.selection import Selection
from hfpatch.errors import InputError
from hfpatch.methods.dhsa import KEY, Dhsa, boundaries
from hfpatch.methods.dhsa.rotary import Rotary
from hfpatch.methods.dhsa.score import score_chunks
from hfpatch.methods.dhsa.table import ChunkTable

SMALL: dict[str, Any] = {
    "budget": 40, "sink": 3, "local": 5, "block_q": 8, "chunk": 5, "radius": 3, "boundary_window": 2, "longest": 11,
    "question_tokens": 0, "close_after": 6,
}  # fmt: skip
HEADS = [(4, 4), (8, 2), (8, 1)]


def method(**settings: Any) -> Dhsa:
    cls = get_method("dhsa")
    return cls(cls.config_class(**{**SMALL, **settings}))


def call(
    lq: int, lk: int, heads: tuple[int, int] = (8, 2), batch: int = 3, states: dict | None = None, seed: int = 0
) -> AttentionCall:
    g = torch.Generator().manual_seed(seed)
    hq, hkv = heads
    phase = "decode" if lq == 1 else "prefill" if lq == lk else "chunk"
    q, k, v = (torch.randn(batch, h, lk, 16, generator=g) for h in (hq, hkv, hkv))
    return AttentionCall(
        0, 1, phase, q[:, :, lk - lq :], k, v, 0.25, rows=tuple(range(batch)), states={} if states is None else states
    )


def by_loops(m: Dhsa, c: AttentionCall, starts: Tensor, ends: Tensor) -> Tensor:
    """The rule of the method, head by head and token by token: `[B, Hkv, Lq, Lk]`."""
    s = m.config
    keep = torch.ones(c.B, c.Hkv, c.Lq, c.Lk, dtype=torch.bool).tril(c.off)
    block = 1 if c.Lq == 1 else s.block_q
    stop = c.Lq if c.Lq == 1 else c.Lq - s.question_tokens
    dense = min(max(0, (s.budget - c.off) // block * block), stop)
    q = c.q.double().unflatten(1, (c.Hkv, c.groups))
    for b in range(c.B):
        chunks = [(x, y) for x, y in zip(starts[b].tolist(), ends[b].tolist(), strict=True) if y > x]
        for h in range(c.Hkv):
            keys = {(x, y): c.k[b, h, x:y].double() for x, y in chunks}
            for first in range(dense, stop, block):
                last = min(first + block, stop)
                score = by_loops_score(m, keys, q[b, h, :, first:last].mean(1), c.off + first)
                low, high = max(c.off + first - s.local, s.sink), c.off + last
                listed = [*range(s.sink), *range(low, high)]
                for x, y in sorted(score, key=lambda span: -score[span]):
                    listed += list(range(max(x, s.sink), min(y, low)))[: s.budget - len(listed)]
                assert len(listed) == len(set(listed)) == s.budget
                seen = torch.zeros(c.Lk, dtype=torch.bool)
                seen[listed] = True
                keep[b, h, first:last] &= seen
    return keep


def variance(k: Tensor) -> Tensor:
    """Variance `[D]` of keys `[n, D]`, averaged over channels d and d + D/2."""
    return k.var(0, correction=0).unflatten(0, (2, -1)).mean(0).repeat(2)


def by_loops_score(m: Dhsa, keys: dict, q: Tensor, upto: int) -> dict[tuple[int, int], float]:
    """Score of every chunk for the queries `q [G, D]` of one group, which begin at token `upto`."""
    past = [span for span in keys if span[1] <= upto]
    mean = {span: k.mean(0) for span, k in keys.items()}
    if m.config.score == "mass":
        total = dict.fromkeys(keys, 0.0)
        for one in q:
            logit = {s: float(one @ mean[s] / 4 + (one / 4) ** 2 @ variance(k) / 2) for s, k in keys.items()}
            norm = sum((y - x) * math.exp(logit[x, y]) for x, y in past)
            for span in keys:
                total[span] += math.exp(logit[span]) / norm
        return total
    common = torch.cat([keys[span] for span in past]).mean(0) if m.config.score == "centered" and past else 0
    return {(x, y): float(q.mean(0) @ (mean[x, y] - common)) * math.sqrt(y - x) for x, y in keys}


def mask(selection: Selection, c: AttentionCall) -> Tensor:
    return selection.mask(c.layout).expand(c.B, c.Hq, c.Lq, c.Lk)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", [63, 111, 257])
@pytest.mark.parametrize("how", ["fixed", "novelty"])
@pytest.mark.parametrize("score", ["mass", "mean", "centered"])
def test_mask_equals_plain_loops(heads: tuple[int, int], length: int, how: str, score: str) -> None:
    m, c = method(boundaries=how, score=score), call(length, length, heads)
    got = mask(m.select(c), c)
    want = by_loops(m, c, *c.state[KEY].spans)
    assert torch.equal(got, want.repeat_interleave(c.groups, dim=1))


@pytest.mark.parametrize("tail", [1, 5, 64])
def test_question_tokens_are_dense(tail: int) -> None:
    m, c = method(question_tokens=tail), call(111, 111)
    got = mask(m.select(c), c)
    assert torch.equal(got, by_loops(m, c, *c.state[KEY].spans).repeat_interleave(4, dim=1))
    starts = c.state[KEY].starts
    assert (starts == 111 - tail).any(1).all(), "a boundary is forced where the question begins"


@pytest.mark.parametrize("how", ["fixed", "novelty"])
@pytest.mark.parametrize("question", [0, 7])
@pytest.mark.parametrize("close_after", [0, 6, 15])
def test_chunked_prefill_and_decode(how: str, question: int, close_after: int) -> None:
    """Every later call sees chunks that cover all of its past; generated tokens are the open chunk."""
    m, states = method(boundaries=how, question_tokens=question, close_after=close_after), {}
    for lq, lk in ((50, 50), (61, 111), (3, 114), (1, 115), (1, 116), (40, 156), *((1, n) for n in range(157, 180))):
        c = call(lq, 200, states=states)
        full = c.k
        c.q, c.k = torch.randn(3, 8, lq, 16), full[:, :, :lk]
        c.phase = "decode" if lq == 1 else "chunk" if lk > lq else "prefill"
        got = m.select(c)
        table = c.state[KEY]
        starts, ends = table.spans
        assert (starts[:, 0] == 0).all() and (ends[:, -1] == lk).all() and torch.equal(starts[:, 1:], ends[:, :-1])
        new = full[:, :, table.closed : lk]
        want_open = torch.cat([new.sum(2), new.square().sum(2)], -1)
        forced = deepcopy(table)
        forced.chunks(c.k)
        torch.testing.assert_close(forced.open, want_open, rtol=1e-4, atol=1e-5)
        want = by_loops(m, c, starts, ends).repeat_interleave(4, dim=1)
        assert torch.equal(want, torch.ones_like(want).tril(lk - lq) if got is None else mask(got, c)), (lq, lk)


def test_paper_keeps_generated_tokens_one_chunk() -> None:
    m, states = method(close_after=0), {}
    m.select(call(60, 60, states=states))
    for n in range(61, 100):
        c = call(1, n, states=states)
        m.select(c)
    assert c.state[KEY].closed == 60 and c.state[KEY].seen == 99


def test_table_is_rebuilt_after_a_crop_or_a_loss() -> None:
    m, states = method(), {}
    m.select(call(100, 100, states=states))
    m.select(call(1, 101, states=states))
    back = call(1, 80, states=states)
    got = mask(m.select(back), back)
    lost = call(1, 80)
    assert torch.equal(got, mask(m.select(lost), lost))
    m.select(call(1, 81, states=states))
    m.select(call(1, 82, states=states))
    again = call(1, 81, states=states)
    m.select(again)
    table = again.state[KEY]
    table.chunks(again.k)
    torch.testing.assert_close(table.open[..., :16], again.k[:, :, 79:].sum(2))


def test_state_follows_beams() -> None:
    m, states = method(), {}
    c = call(60, 60, states=states)
    m.select(c)
    m.select(call(1, 61, states=states))
    table = c.state[KEY].reorder(torch.tensor([2, 2, 0]))
    assert torch.equal(table.starts, c.state[KEY].starts[[2, 2, 0]])
    want = c.state[KEY].chunks(c.k).statistics[[2, 2, 0]]
    assert torch.equal(table.chunks(c.k[[2, 2, 0]]).statistics, want)


@pytest.mark.parametrize("align", [4, 8])
@pytest.mark.parametrize("lq", [257, 100, 1])
def test_aligned_lists_respect_the_budget(align: int, lq: int) -> None:
    m = method(budget=64, align=align, chunk=8, boundaries="novelty")
    c = call(lq, 257)
    selection = m.select(c)
    got = mask(selection, c)
    per_query = got.sum(-1)
    assert per_query.max() <= 64
    assert int(selection.attended(c.layout)) == int(got.sum())
    last = got[:, :, -1]
    assert last[..., :3].all() and last[..., -5:].all()
    if lq == 257:
        flags = c.state[KEY].starts
        assert (flags % align == 0).logical_or(flags == 257).all()


@pytest.mark.parametrize("budget", [16, 17, 40, 100])
@pytest.mark.parametrize("lq", [111, 30, 1])
def test_budget_is_exact_and_nothing_listed_twice(budget: int, lq: int) -> None:
    m, c = method(budget=budget), call(lq, 111)
    got = mask(m.select(c), c)
    n = torch.arange(c.off, c.Lk)
    seen = got.sum(-1)
    assert (seen <= budget).all() and (seen[..., -1] == min(budget, 111)).all()
    assert (seen[..., n < budget // 8 * 8] == n[n < budget // 8 * 8] + 1).all()


def test_share_of_the_keys_as_budget() -> None:
    m, c = method(budget=0.5), call(1, 111)
    assert (mask(m.select(c), c).sum(-1) == 56).all()


def test_early_needle_is_kept() -> None:
    """A chunk every query asks for stays in every list, although it lies early and is found first."""
    m = method(sink=0, local=4, budget=24)
    c = call(200, 200)
    c.q[:] = 0.1 * c.q + 1
    c.k[:, :, 7:15] += 10
    got = mask(m.select(c), c)[:, :, 24:]
    assert got[..., 7:15].all()


def test_one_selection_for_all_heads() -> None:
    m, c = method(head_sharing="all"), call(111, 111, (8, 4))
    got = m.select(c).mask(c.layout)
    averaged = AttentionCall(
        0, 1, "prefill", c.q.mean(1, keepdim=True), c.k.mean(1, keepdim=True), c.v[:, :1], 0.25, rows=c.rows
    )
    own = method(boundaries="fixed", head_sharing="all", score="mean")
    assert got.shape[1] == 1
    assert torch.equal(own.select(c).mask(c.layout), own.select(averaged).mask(averaged.layout))


def test_mass_finds_one_strong_key_that_a_mean_hides() -> None:
    """One key of sixteen stands out; its chunk's mean hardly moves, the variance of its keys does."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 160, 16, generator=g)
    k[:, :, 40] = 6.0
    table = ChunkTable.empty(k)
    table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 160, 16, k.device))
    q, upto = torch.ones(1, 2, 1, 16), torch.tensor([160])
    chunks = table.chunks(k)
    mass = score_chunks(q, chunks, "mass", upto, 0.25)
    assert int(mass.argmax()) == 2 and bool(mass.isfinite().all())


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(share=0.5), Rotary(tail=6), Rotary(interleaved=True)], ids=str)
def test_mass_does_not_depend_on_where_positions_begin(rotary: Rotary) -> None:
    """Turning queries and keys by the same angles, as left padding does, changes no score."""
    k, q, upto = torch.randn(1, 2, 96, 16), torch.randn(1, 4, 3, 16), torch.tensor([32, 64, 96])
    turned = 6 if rotary.tail else int(16 * rotary.share)
    start, half = (10 if rotary.tail else 0), turned // 2
    angle = torch.rand(half) * 6

    one, other = slice(start, start + half), slice(start + half, start + turned)
    if rotary.interleaved:
        one, other = slice(start, start + turned, 2), slice(start + 1, start + turned, 2)

    def turn(x: Tensor) -> Tensor:
        a, b, x = x[..., one], x[..., other], x.clone()
        x[..., one] = a * angle.cos() - b * angle.sin()
        x[..., other] = a * angle.sin() + b * angle.cos()
        return x

    def scores(q: Tensor, k: Tensor) -> Tensor:
        table = ChunkTable.empty(k, rotary)
        table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 96, 8, k.device))
        return score_chunks(q, table.chunks(k), "mass", upto, 0.25)

    torch.testing.assert_close(scores(turn(q), turn(k)), scores(q, k), rtol=1e-4, atol=1e-4)


def test_rotary_bands_rank_what_one_band_sees() -> None:
    """A chunk that only the slow channels favour wins although the fast ones, washed out, add noise."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 80, 32, generator=g) * 0.1
    slow = [*range(12, 16), *range(28, 32)]
    k[:, :, 24:32, slow] += 1
    table = ChunkTable.empty(k)
    table.close(k.shape[2], lambda start, stop: boundaries.fixed(1, 0, 80, 8, k.device))
    q = torch.zeros(1, 1, 1, 32)
    q[..., slow] = 1
    score = score_chunks(q, table.chunks(k), "bands", torch.tensor([80]), 0.25)
    assert int(score.argmax()) == 3
    early = score_chunks(q, table.chunks(k), "bands", torch.tensor([30]), 0.25)
    assert (early[..., 3:] == 0).all()


@pytest.mark.parametrize("share,span", [("boundaries", 0), ("selection", 0), ("selection", 2)])
def test_layers_share_with_their_leader(share: str, span: int) -> None:
    m = method(layer_sharing=share, layer_sharing_span=span)
    m.prepare(torch.nn.Identity(), [1, 2, 3, 5])
    calls = [call(111, 111, seed=n) for n in range(4)]
    forward = Forward()
    for c, layer in zip(calls, [1, 2, 3, 5], strict=True):
        c.layer, c.forward = layer, forward
    masks = [mask(m.select(c), c) for c in calls]
    same = [torch.equal(a, b) for a, b in pairwise(masks)]
    if share == "selection":
        assert same == ([True] * 3 if span == 0 else [True, False, True])
    else:
        assert not any(same)
        assert all(torch.equal(c.state[KEY].starts, calls[0].state[KEY].starts) for c in calls)


def test_greedy_suppression_equals_brute_force() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        score = torch.randn(3, 257, generator=g)
        score[torch.rand(3, 257, generator=g) < 0.3] = -torch.inf
        for radius in (0, 1, 3, 8, 300):
            got = boundaries.suppress(score, radius)
            for b in range(3):
                assert got[b].nonzero()[:, 0].tolist() == boundaries.brute_force(score[b].tolist(), radius)


@pytest.mark.parametrize(
    "score", [torch.zeros(2, 500), torch.arange(500.0).expand(2, -1), torch.full((1, 9), -torch.inf)]
)
def test_suppression_of_plateaus_and_ramps_is_a_maximal_set(score: Tensor) -> None:
    kept = boundaries.suppress(score, 4)
    for row, valid in zip(kept, score > -torch.inf, strict=True):
        at = row.nonzero()[:, 0]
        assert (at.diff() > 4).all()
        far = (torch.arange(score.shape[1])[:, None] - at).abs().min(1).values > 4 if len(at) else ~valid
        assert not (far & valid).any()


def test_cap_keeps_the_best_boundaries() -> None:
    score = torch.randn(2, 200)
    flags = boundaries.cut(score, boundaries.Cutting(radius=3, mean=20))
    for row, s in zip(flags, score, strict=True):
        kept = boundaries.brute_force(s.tolist(), 3)
        want = sorted({0, *sorted(kept, key=lambda n: -float(s[n]))[:10]})
        assert row.nonzero()[:, 0].tolist() == want


def test_forced_boundary_ends_the_search() -> None:
    flags = boundaries.cut(torch.randn(2, 100), boundaries.Cutting(radius=3, mean=5), forced=70)
    assert flags[:, 70].all() and not flags[:, 71:].any() and not flags[:, 67:70].any()


def test_novelty_is_the_cosine_of_mean_keys() -> None:
    k = torch.randn(2, 3, 40, 8)
    got = boundaries.novelty(k, 4)
    assert got[:, :4].isneginf().all() and got[:, 37:].isneginf().all()
    for b in range(2):
        for p in range(4, 37):
            left, right = k[b, :, p - 4 : p].mean(1).flatten(), k[b, :, p : p + 4].mean(1).flatten()
            assert abs(float(got[b, p]) - (1 - float(torch.cosine_similarity(left, right, dim=0)))) < 1e-5


def test_novelty_finds_a_change_of_topic() -> None:
    k = torch.randn(1, 1, 90, 16) * 0.1
    k[:, :, :30, 0] += 1
    k[:, :, 30:71, 1] += 1
    k[:, :, 71:, 2] += 1
    flags = boundaries.cut(boundaries.novelty(k), boundaries.Cutting(mean=45))
    assert flags[0].nonzero()[:, 0].tolist() == [0, 30, 71]


def test_long_chunks_are_split_and_lists_are_ragged() -> None:
    flags = torch.zeros(2, 50, dtype=torch.bool)
    flags[0, [0, 7, 40]] = True
    flags[1, 0] = True
    split = boundaries.split_long(flags, 16)
    assert split[0].nonzero()[:, 0].tolist() == [0, 7, 23, 39, 40]
    assert split[1].nonzero()[:, 0].tolist() == [0, 16, 32, 48]
    assert boundaries.to_list(split, 100).tolist() == [[100, 107, 123, 139, 140], [100, 116, 132, 148, 150]]


def test_representation_is_unbiased_under_length() -> None:
    """The noise of a score must not depend on the chunk's length; the mean's own shrinks, the sum's own grows."""
    k = torch.randn(64, 1, 1040, 16)
    table = ChunkTable.empty(k)
    flags = torch.zeros(64, 1040, dtype=torch.bool)
    lengths = [4] * 32 + [16] * 32 + [25, 375]
    flags[:, torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    table.close(k.shape[2], lambda start, stop: flags)
    noise = table.chunks(k).represent(16, False)[:, 0, :-1].square().mean((0, 2)).sqrt()
    assert abs(float(noise[:32].mean()) - 1) < 0.05 and abs(float(noise[32:64].mean()) - 1) < 0.05
    assert abs(float(noise[-1]) - 1) < 0.1


def test_notes_count_chunks() -> None:
    m, c = method(boundaries="fixed", longest=0), call(100, 100)
    m.select(c)
    assert m.notes() == ["dhsa: layer 0: 63 chunks, 4.8 tokens on average"]


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"budget": 10}, "no room"), ({"budget": 1.5}, "share"), ({"boundaries": "fixed", "align": 4}, "multiple"),
        ({"boundaries": "fixd"}, "not one of"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_to_do(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        method(**settings)


@torch.no_grad()
def test_generation_on_a_soft_capped_model_with_left_padding() -> None:
    """Gemma2: soft-cap and sliding layers; a row in a padded batch generates what it generates alone."""
    model = zoo.SUPPORTED["gemma2"].build()
    ids = zoo.prompt(model, 3, 63)
    batch, attention = zoo.left_pad(ids, [63, 50, 37])
    with patched(model, "dhsa", **{**SMALL, "budget": 24, "question_tokens": 4}) as patch:
        together = model.generate(batch, attention_mask=attention, max_new_tokens=12, do_sample=False)
        for row, n in enumerate([63, 50, 37]):
            alone = model.generate(ids[row : row + 1, :n], max_new_tokens=12, do_sample=False)
            assert torch.equal(together[row, 63:], alone[0, n:])
        report = patch.report()
    assert not report.fallbacks() and report.density("decode") < 0.6


@torch.no_grad()
def test_beams_and_assistants_keep_the_table() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 63)
    with patched(model, "dhsa", **SMALL):
        out = model.generate(ids, max_new_tokens=10, num_beams=3, do_sample=False)
    assert out.shape[1] == 73


@torch.no_grad()
def test_the_span_of_the_question_is_dense_row_by_row() -> None:
    model, lengths = zoo.SUPPORTED["llama"].build(), [63, 40]
    ids = zoo.prompt(model, 2, 63)
    padded, mask = zoo.left_pad(ids, lengths)
    with patched(model, "dhsa", **SMALL) as patch:
        plain = model(ids).logits
        with patch.spans(question=[(50, 60), (50, 60)]):
            told = model(ids).logits
        assert torch.equal(model(ids).logits, plain) and not torch.equal(told, plain)
        with patch.spans(question=[None, None]):
            assert torch.equal(model(ids).logits, plain)
        with patch.spans(question=[(50, 60), (30, 35)]):
            both = model(padded, attention_mask=mask).logits
        with patch.spans(question=[(50, 60)]):
            beams = model(ids[:1].expand(2, -1)).logits
        for row, (places, n) in enumerate(zip([[(50, 60)], [(30, 35)]], lengths, strict=True)):
            with patch.spans(question=places):
                alone = model(padded[row : row + 1, -n:]).logits
            torch.testing.assert_close(both[row, -n:], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(beams[1], told[0], rtol=1e-4, atol=1e-5)
        with patch.spans(question=[(50, 60)] * 4), pytest.raises(InputError, match="4 rows, the batch has 2"):
            model(ids)
        for bad in ([], [(3,)], [(5, 5)], [(-1, 4)]):
            with pytest.raises(ConfigError, match="per row"), patch.spans(question=bad):
                pass
    with patched(model, "dhsa", **{**SMALL, "question_tokens": 13}):
        torch.testing.assert_close(model(ids).logits, told, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_question_in_two_chunks_is_dense_in_both() -> None:
    m, states = method(), {}
    spans = {"question": [(50, 90)] * 3}
    first = replace(call(60, 60, states=states), spans=spans)
    seen = m.select(first).mask(first.layout).sum(-1)
    assert (seen[:, :, 50:] == torch.arange(51, 61)).all() and (seen[:, :, 49] <= 40).all()
    assert m.select(replace(call(40, 100, states=states), spans=spans)) is None


@pytest.mark.parametrize("align", [1, 4, 16])
def test_query_blocks_follow_the_budget(align: int) -> None:
    """Blocks are an eighth of the budget, 16 to 256, and whatever the budget there is room for sink and local."""
    make = get_method("dhsa").config_class
    around = 64 + 128 + (3 * align if align > 1 else 0)
    for budget in [*range(around + 16, 400, 7), 512, 1000, 2048, 5000]:
        s = make(budget=budget, align=align, chunk=16)
        block = s.block(s.units(10_000))
        assert block % align == 0 and 16 <= block <= 256
        assert around + block <= s.units(10_000) * align
        assert block == 16 or block <= budget / 8 + align
    assert make(budget=2048).block(2048) == 256 and make(budget=1024).block(1024) == 128
    share = make(budget=0.01, align=align, chunk=16)
    assert share.block(share.units(1000)) == 16 and share.block(share.units(100_000)) <= 1000 / 8
    with pytest.raises(ConfigError, match=r"sink \+ local \+ 16 queries"):
        make(budget=around + 15, align=align, chunk=16)


def test_default_blocks_equal_named_ones() -> None:
    c = call(300, 300)
    room = {"budget": 136, "block_q": None}
    chosen, named = (method(**{**room, **more}).select(c) for more in ({}, {"block_q": 17}))
    assert torch.equal(chosen.mask(c.layout), named.mask(c.layout))


@pytest.mark.parametrize("boundaries", ["fixed", "novelty"])
def test_no_chunk_mixes_the_sink_with_what_follows(boundaries: str) -> None:
    """The initial keys are always visible and often outliers: they must not speak for the tokens after them."""
    c = call(111, 111)
    c.k[:, :, :7] += 50
    method(boundaries=boundaries, sink=7, budget=48).select(c)
    table = c.state[KEY]
    starts, ends = table.spans
    assert (starts == 7).any(1).all() and not ((starts < 7) & (ends > 7)).any()
    chunk = int((starts[0] == 7).nonzero()[0])
    mean = c.k[0, :, 7 : int(ends[0, chunk])].mean(1)
    torch.testing.assert_close(table.chunks(c.k).statistics[0, :, chunk, :16], mean)
