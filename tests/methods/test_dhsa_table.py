"""DHSA's chunk table: sums over ragged chunks, what it keeps between calls, half-precision keys."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hfpatch import get_method
from hfpatch.core.call import AttentionCall
from hfpatch.methods.dhsa import KEY, Dhsa
from hfpatch.methods.dhsa import table as module
from hfpatch.methods.dhsa.rotary import Rotary
from hfpatch.methods.dhsa.table import ChunkTable, chunk_sums

SMALL = {
    "budget": 40, "sink": 3, "local": 5, "block_q": 8, "chunk": 5, "question_tokens": 0, "close_after": 6,
    "boundaries": "novelty",
}  # fmt: skip


def method() -> Dhsa:
    cls = get_method("dhsa")
    return cls(cls.config_class(**SMALL, score="mass"))


def call(k: Tensor, lq: int, states: dict) -> AttentionCall:
    q = torch.randn(k.shape[0], 2 * k.shape[1], lq, k.shape[3]).to(k)
    phase = "decode" if lq == 1 else "prefill" if lq == k.shape[2] else "chunk"
    return AttentionCall(0, 1, phase, q, k, k, 0.25, rows=tuple(range(k.shape[0])), states=states)


def tight(k: Tensor, sizes: list[int], rotary: Rotary = Rotary()) -> ChunkTable:  # noqa: B008
    """A table of `k` cut into chunks of `sizes`."""
    flags = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    flags[:, torch.tensor([0, *sizes]).cumsum(0)[:-1]] = True
    made = ChunkTable.empty(k, rotary)
    made.close(k.shape[2], lambda start, stop: flags)
    return made


@pytest.mark.parametrize("segment", [4, 12, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_sums_of_ragged_rows(segment: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT", segment)
    monkeypatch.setattr(module, "LARGEST_COPY", segment * 60)  # all heads, or one at a time
    k, starts = torch.randn(2, 3, 50, 8).to(dtype), torch.tensor([[5, 9, 30, 40, 41], [5, 40, 50, 50, 50]])
    before, want = k.clone(), torch.zeros(2, 3, 5, 16)
    for row, edges in enumerate([[5, 9, 30, 40, 41, 50], [5, 40, 50]]):
        for n, (low, high) in enumerate(pairwise(edges)):
            x = k[row, :, low:high].float()
            want[row, :, n] = torch.cat([x.sum(1), x.square().sum(1)], -1)
    torch.testing.assert_close(chunk_sums(k, starts, 5), want)
    torch.testing.assert_close(module._sums_by_heads(k, starts, 5), want)
    one = chunk_sums(k[:, :1].float(), starts, 5)
    torch.testing.assert_close(one, want[:, :1])
    assert torch.equal(k, before), "keys are left as they are"


@pytest.mark.parametrize("rotary", [Rotary(), Rotary(share=0.5), Rotary(tail=6), Rotary(interleaved=True)], ids=str)
def test_moments_are_means_and_variances_per_plane(rotary: Rotary) -> None:
    k = torch.randn(2, 3, 30, 16)
    chunks = tight(k, [4, 16, 10], rotary).chunks(k)
    turned = 6 if rotary.tail else int(16 * rotary.share)
    start = 10 if rotary.tail else 0
    planes = [[c] for c in range(start)]
    if rotary.interleaved:
        planes += [[c, c + 1] for c in range(start, start + turned, 2)]
    else:
        planes += [[c, c + turned // 2] for c in range(start, start + turned // 2)]
    planes += [[c] for c in range(start + turned, 16)]
    for n, (low, high) in enumerate(((0, 4), (4, 20), (20, 30))):
        x = k[:, :, low:high]
        spread = x.var(2, correction=0)
        want = torch.cat([x.mean(2), torch.stack([spread[..., p].mean(-1) for p in planes], -1)], -1)
        torch.testing.assert_close(chunks.statistics[:, :, n], want)


def test_a_prompt_leaves_only_boundaries_until_decode() -> None:
    """While the other layers prefill, a layer's moments would only take memory."""
    m, states, k = method(), {}, torch.randn(3, 2, 130, 16)
    m.select(call(k[:, :, :111], 111, states))
    table = call(k, 1, states).state[KEY]
    assert table.moments.shape[2] == 1 and table.measured == 0 and table.closed == 111
    m.select(call(k[:, :, :112], 1, states))
    assert table.moments.shape[2] == table.starts.shape[1] + 1 and table.measured == 111
    kept = table.moments[:, :, :-1].clone()
    m.select(call(k[:, :, :113], 1, states))
    assert torch.equal(table.moments[:, :, :-1], kept)


def test_measured_late_is_measured_the_same() -> None:
    k = torch.randn(3, 2, 96, 16)
    early, late = tight(k[:, :, :60], [7, 20, 33]), tight(k[:, :, :60], [7, 20, 33])
    early.chunks(k[:, :, :60])
    for table in (early, late):
        table.close(96, lambda start, stop: torch.arange(stop - start).remainder(9).eq(0).expand(3, -1))
    want = late.chunks(k).statistics
    torch.testing.assert_close(early.chunks(k).statistics, want)
    late.forget()
    torch.testing.assert_close(late.chunks(k).statistics, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_have_the_dtype_of_the_keys(dtype: torch.dtype) -> None:
    """As much memory per chunk as one and a half keys; outliers do not overflow."""
    k = torch.randn(1, 2, 64, 16)
    k[:, :, 40:48, 3] = torch.tensor([1000.0, -1000.0] * 4)
    k = k.to(dtype)
    got = tight(k, [16, 16, 32]).chunks(k).statistics
    want = tight(k.float(), [16, 16, 32]).chunks(k.float()).statistics
    assert got.dtype == dtype and got.isfinite().all() and got.shape[-1] == 24
    torch.testing.assert_close(got.float(), want.clamp(max=torch.finfo(dtype).max), rtol=1e-2, atol=1e-2)


def test_the_open_chunk_counts_the_tokens_that_are_there() -> None:
    """Tokens may be dropped from the cache and replaced, between two looks or before one."""
    k = torch.randn(2, 2, 40, 16)
    table = tight(k[:, :, :20], [20])
    for start, stop in ((20, 21), (21, 25), (23, 24), (24, 30), (20, 26), (22, 40)):
        k[:, :, start:stop] = torch.randn(2, 2, stop - start, 16)
        table.grow(start, stop)
        if (start, stop) != (24, 30):
            got = table.chunks(k[:, :, :stop])
            torch.testing.assert_close(got.statistics[:, :, -1, :16], k[:, :, 20:stop].mean(2))
            assert got.ends[0, -1] == stop


def test_the_open_chunk_is_summed_when_somebody_looks() -> None:
    k = torch.randn(2, 2, 40, 16)
    table = tight(k[:, :, :20], [20])
    table.grow(20, 30)
    table.chunks(k, upto=20)
    assert table.added == 20
    table.chunks(k, upto=21)
    assert table.added == 30
