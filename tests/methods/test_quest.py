"""`quest`: its choice against the plain loop, the bound on every page, and the life of its page table."""

import pytest
import torch
import zoo
from method_calls import DECODES, check_executors, chosen_mask, make_call, make_method
from oracles import quest

from hfpatch import patched
from hfpatch.methods.quest import Pages


@pytest.mark.parametrize("shape", DECODES)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("page", [4, 16])
def test_equals_the_formula(shape, share, page):
    call = make_call(DECODES[shape], dv=24)
    method = make_method("quest", min_length=0, budget=32, page=page, head_sharing=share)
    assert torch.equal(chosen_mask(method, call), quest(call, 32, page, share))
    check_executors(method, call)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bound_holds_for_every_page(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    k = (torch.randn(2, 3, 111, 8, generator=g) * 10 ** torch.randn(2, 3, 1, 8, generator=g)).to(dtype)
    q = torch.randn(2, 6, 8, generator=g).to(dtype)
    pages = Pages(16, k)
    pages.update(k)
    bounds = pages.bounds(q).double()
    products = torch.einsum("bhgd,bhjd->bhgj", q.double().unflatten(1, (3, 2)), k.double()).flatten(1, 2)
    for j in range(111):
        assert (products[..., j] <= bounds[..., j // 16] * (1 + 1e-5) + 1e-5 * bounds.abs().max()).all()


@pytest.mark.parametrize("start", [1, 15, 16, 17, 111])
def test_pages_follow_a_growing_cache(start):
    k = torch.randn(2, 2, 300, 8)
    pages = Pages(16, k[:, :, :start])
    n = start
    for step in [1] * 40 + [16, 31, 5, 1, 1]:
        pages.update(k[:, :, :n])
        fresh = Pages(16, k[:, :, :n])
        fresh.update(k[:, :, :n])
        used = -(-n // 16)
        assert torch.equal(pages.low[:, :, :used], fresh.low[:, :, :used])
        assert torch.equal(pages.high[:, :, :used], fresh.high[:, :, :used])
        n += step


def test_pages_are_reordered_and_rebuilt():
    k = torch.randn(3, 2, 50, 8)
    pages = Pages(16, k)
    pages.update(k)
    index = torch.tensor([2, 0, 0])
    moved = pages.reorder(index)
    moved.update(torch.cat([k[index], k[:, :, :1]], 2))
    fresh = Pages(16, k)
    fresh.update(torch.cat([k[index], k[:, :, :1]], 2))
    assert torch.equal(moved.low[:, :, :4], fresh.low[:, :, :4])
    other = torch.randn(3, 2, 40, 8)
    pages.crop(30)
    pages.update(other)
    assert torch.equal(pages.high[:, :, 1], other[:, :, 16:32].amax(2))


def test_state_is_kept_and_may_vanish():
    method = make_method("quest", min_length=0, budget=32, page=4, head_sharing="head")
    full = make_call((1, 4, 2, 1, 130))
    states: dict = {}
    for n in range(100, 130):
        call = make_call((1, 4, 2, 1, 130), states=states)
        call.k, call.v = full.k[:, :, :n], full.v[:, :, :n]
        if n == 115:
            states.clear()
        assert torch.equal(chosen_mask(method, call), quest(call, 32, 4, "head"))


def test_budget_above_the_length_is_dense():
    call = make_call(DECODES["decode111"])
    assert make_method("quest", min_length=0, budget=111).select(call) is None
    keep = chosen_mask(make_method("quest", min_length=0, budget=1.0), call)
    assert keep.all()


def test_paper_preset_leaves_two_layers():
    method = make_method("quest", dense_layers=2)
    assert method.pick([0, 1, 2, 3]) == [2, 3]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_padded_rows_decode_as_alone(name):
    model = zoo.SUPPORTED[name].build()
    ids = zoo.prompt(model, 3, 63)
    lengths = [63, 40, 25]
    batch, mask = zoo.left_pad(ids, lengths)
    more = zoo.prompt(model, 3, 20, seed=5)
    settings = dict(min_length=0, budget=12, page=4)

    @torch.no_grad()
    def decode(prompts, mask, tokens):
        cache = model(prompts, attention_mask=mask, position_ids=zoo.positions(mask), use_cache=True).past_key_values
        steps = []
        for n in range(tokens.shape[1]):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            at = zoo.positions(mask)[:, -1:]
            out = model(tokens[:, n : n + 1], attention_mask=mask, position_ids=at, past_key_values=cache)
            steps.append(out.logits[:, 0])
        return torch.stack(steps, 1)

    with patched(model, "quest", **settings) as patch:
        together = decode(batch, mask, more)
        for row, n in enumerate(lengths):
            alone = decode(ids[row : row + 1, :n], torch.ones(1, n, dtype=torch.long), more[row : row + 1])
            assert (together[row] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()
        assert patch.report().density("decode") < 0.6 and not patch.report().fallbacks()


def test_beams_reorder_the_pages(monkeypatch):
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, 50)
    made = dict(max_new_tokens=24, num_beams=3, do_sample=False)
    with patched(model, "quest", min_length=0, budget=12, page=4):
        kept = model.generate(ids, **made)
        monkeypatch.setattr(Pages, "reorder", lambda self, index: Pages(self.size, self.low[index]))
        rebuilt = model.generate(ids, **made)
    assert torch.equal(kept, rebuilt)


def test_prefill_and_decode_methods_combine():
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 1, 63)
    pair = [
        make_method(
            "flash_prefill", min_length=0, block_q=8, block_k=8, sink_blocks=1, window_blocks=1, alpha=0.9
        ).config,
        make_method("quest", min_length=0, budget=12, page=4).config,
    ]
    with patched(model, pair) as patch:
        model.generate(ids, max_new_tokens=8)
        report = patch.report()
    assert report.density("prefill") < 1 and report.density("decode") < 0.6
