"""DHSA from call to call: chunked prefill, decode, beams, the question's span, layers that share."""

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import zoo
from dhsa_helpers import SMALL, by_loops, call, mask, method

from hfpatch import ConfigError, patched
from hfpatch.core.call import Forward
from hfpatch.errors import InputError
from hfpatch.methods.dhsa import KEY


@pytest.mark.thin(2)
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
