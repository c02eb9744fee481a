"""DHSA: the chosen tokens against plain loops, budgets, blocks of queries, settings."""

from typing import Any

import pytest
import torch
from dhsa_helpers import by_loops, call, mask, method

from hfpatch import ConfigError, get_method
from hfpatch.core.call import AttentionCall
from hfpatch.methods.dhsa import KEY

HEADS = [(4, 4), (8, 2), (8, 1)]


@pytest.mark.thin(2)
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
