"""DHSA's chunks ranked by real queries, against attention written out."""

import pytest
import torch
from method_calls import make_call, make_method
from torch import Tensor

from hfpatch.core import sampling
from hfpatch.core.call import AttentionCall
from hfpatch.errors import ConfigError
from hfpatch.methods.dhsa.rotary import Rotary
from hfpatch.methods.dhsa.score import Chunks, score_by_queries

SHAPES = {"L63-gqa2": (2, 4, 2, 63, 63), "chunk50of161": (1, 8, 2, 50, 161)}


def chunks_of(call: AttentionCall) -> Chunks:
    """Ragged chunks of 3 to 9 tokens, an empty one at the end of each row."""
    starts = [sorted({0, *range(3 + row, call.Lk, 7 + row)}) for row in range(call.B)]
    wide = max(map(len, starts)) + 1
    begin = torch.tensor([s + [call.Lk] * (wide - len(s)) for s in starts])
    end = torch.cat([begin[:, 1:], torch.full((call.B, 1), call.Lk)], 1)
    return Chunks(torch.zeros(call.B, call.Hkv, wide, 24), begin, end, Rotary())


def weights_of(call: AttentionCall) -> Tensor:
    s = call.scale * call.q @ call.k.repeat_interleave(call.groups, 1).mT
    return s.masked_fill(call.k_pos > call.q_pos[:, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("block,queries,start,stop", [(16, 4, 0, 50), (8, 8, 5, 45), (32, 1, 16, 50), (1, 1, 49, 50)])
def test_equals_the_mean_attention_per_token(
    shape: str, shared: bool, block: int, queries: int, start: int, stop: int
) -> None:
    call = make_call(SHAPES[shape])
    chunks, weights = chunks_of(call), weights_of(call)
    got = score_by_queries(call, chunks, start, stop, block, queries, shared)
    heads = 1 if shared else call.Hkv
    for n, first in enumerate(range(start, stop, block)):
        size = min(block, stop - first)
        rows = [first + max((m + 1) * size // queries - 1, 0) for m in range(queries)]
        mean = weights[:, :, rows].mean(2).unflatten(1, (heads, -1)).sum(2)  # [B, H, Lk]
        last = call.off + min(first + block, stop)
        for b in range(call.B):
            for c, (a, z) in enumerate(zip(chunks.starts[b].tolist(), chunks.ends[b].tolist(), strict=True)):
                if a < z <= last:
                    torch.testing.assert_close(
                        got[b, :, n, c].exp(), mean[b, :, a:z].sum(-1) / (z - a), rtol=1e-4, atol=1e-7
                    )
                elif a >= last:
                    assert bool(got[b, :, n, c].isneginf().all())


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(SHAPES["chunk50of161"])
    want = score_by_queries(call, chunks_of(call), 0, 50, 8, 3)
    monkeypatch.setattr(sampling, "CHUNK_ELEMENTS", 1)
    assert torch.equal(score_by_queries(call, chunks_of(call), 0, 50, 8, 3), want)


def test_what_one_query_looks_for_is_kept() -> None:
    """The mean query of its block points elsewhere."""
    call = make_call((1, 1, 1, 256, 256), dim=32)
    call.q.mul_(0.1)
    wanted = torch.nn.functional.one_hot(torch.tensor(3), 32) * 6.0
    call.k[0, 0, 40], call.q[0, 0, 255] = wanted, wanted
    common = {
        "budget": 72,
        "sink": 0,
        "local": 0,
        "block_q": 64,
        "boundaries": "fixed",
        "chunk": 8,
        "question_tokens": 0,
    }
    kept = {}
    for score in ("queries", "mass"):
        selection = make_method("dhsa", score=score, **common).select(call)
        kept[score] = bool(selection.mask(call.layout)[0, 0, 255, 40])
    assert kept == {"queries": True, "mass": False}


@pytest.mark.parametrize("decode,kept", [(None, 80), (0.5, 200), (120, 120)])
def test_decode_steps_have_a_budget_of_their_own(decode: float | None, kept: int) -> None:
    settings = {"budget": 80, "sink": 4, "local": 8, "block_q": 16, "question_tokens": 0, "decode_budget": decode}
    step, prompt = make_call((2, 4, 2, 1, 400)), make_call((2, 4, 2, 400, 400))
    one, many = (make_method("dhsa", score="queries", **settings).select(c) for c in (step, prompt))
    assert one.mask(step.layout).sum(-1).eq(kept).all()
    assert many.mask(prompt.layout).sum(-1).max() == 80


def test_a_decode_step_sees_what_weighs_most() -> None:
    """Its own attention chooses: no other choice of as many chunks of one token keeps more."""
    call = make_call((1, 4, 2, 1, 200))
    selection = make_method(
        "dhsa", score="queries", budget=40, sink=0, local=0, block_q=16, boundaries="fixed", chunk=1
    ).select(call)
    own = weights_of(call).unflatten(1, (call.Hkv, -1)).sum(2)[0, :, 0]
    mask = selection.mask(call.layout)[0, :: call.groups, 0]
    best = own[:, :-1].topk(39).values.sum(-1) + own[:, -1]
    torch.testing.assert_close((own * mask).sum(-1), best)


def test_no_room_in_a_decode_step_is_said() -> None:
    with pytest.raises(ConfigError, match="decode_budget=72 has no room"):
        make_method("dhsa", budget=200, sink=8, local=64, decode_budget=72)


def test_decode_steps_are_dense_where_choosing_would_not_pay() -> None:
    """Eight budgets of 1,024 tokens or more; smaller ones, shares and a limit that was asked for do as they say."""
    step, few = make_call((1, 4, 2, 1, 9000), dim=4), make_call((1, 4, 2, 1, 8000), dim=4)
    sparse = {}
    for label, settings in {
        "1024": {"budget": 1024}, "in decode": {"budget": 400, "decode_budget": 1024}, "share": {"budget": 0.5},
        "small": {"budget": 400}, "asked": {"budget": 1024, "decode_min_length": 0},
        "later": {"budget": 400, "decode_min_length": 8500},
    }.items():  # fmt: skip
        found = make_method("dhsa", boundaries="fixed", **settings)
        sparse[label] = [found.select(c) is not None for c in (few, step)]
    late, soon = [False, True], [True, True]
    assert sparse == {"1024": late, "in decode": late, "share": soon, "small": soon, "asked": soon, "later": late}
    assert make_method("dhsa").notes() == [
        "dhsa: decode steps with fewer than 16384 keys run dense (decode_min_length)"
    ]
    assert make_method("dhsa", phase="prefill").notes() == make_method("dhsa", budget=400).notes() == []
