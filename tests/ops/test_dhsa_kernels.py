"""DHSA's Triton kernels against its torch code: in Triton's interpreter, on a GPU where there is one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")

from hfpatch.core.call import AttentionCall
from hfpatch.methods.dhsa import boundaries, fused, trust
from hfpatch.methods.dhsa.choose import Room, Rooms, choose
from hfpatch.methods.dhsa.rotary import Rotary
from hfpatch.methods.dhsa.score import pool_queries, score_by_queries, score_chunks
from hfpatch.methods.dhsa.table import ChunkTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = {"one": (2, 2), "four": (8, 2), "eight": (8, 1)}


def made_call(heads: tuple[int, int], keys: int, d: int = 16, batch: int = 2, **more) -> AttentionCall:
    hq, hkv = heads
    q, k = torch.randn(batch, hq, 1, d, device=DEVICE), torch.randn(batch, hkv, keys, d, device=DEVICE)
    return AttentionCall(0, 1, "decode", q, k, k, d**-0.5, rows=tuple(range(batch)), **more)


def made_table(call: AttentionCall, closings: tuple[int, ...], rotary: Rotary = Rotary(), rate: float = 0.15):  # noqa: B008
    """Ragged chunks, closed in several parts; what follows is the open chunk."""
    table = ChunkTable.empty(call.k, rotary)
    for stop in closings:

        def find(start: int, stop: int) -> Tensor:
            flags = torch.rand(call.B, stop - start, device=DEVICE) < rate
            flags[:, 0] = True
            return flags

        table.close(stop, find)
    if table.closed < call.Lk:
        table.grow(table.closed, call.Lk)
    return table


def room_of(
    call: AttentionCall, budget: int, align: int = 1, first: int | None = None, block: int = 1, **around
) -> Room:
    around = {"sink": 3, "local": 6, **around}
    rooms = Rooms(around["sink"], around["local"], align)
    return rooms.of((call.off if first is None else first, call.Lk), block, budget // align, call.Lk, call.k.device)


def by_torch(call: AttentionCall, table: ChunkTable, room: Room, rule: str, shared: bool) -> Tensor:
    chunks = table.chunks(call.k)
    if rule == "queries":
        score = score_by_queries(call, chunks, 0, 1, 1, 1, shared)
    else:
        score = score_chunks(pool_queries(call.q, 1), chunks, rule, room.units.begin, call.scale, shared)
    return choose(score, chunks.starts, chunks.ends, room)


def compare(call: AttentionCall, table: ChunkTable, room: Room, rule: str, shared: bool) -> None:
    got = fused.choose(fused.scores(call, table, room, rule, shared), table, room)
    assert got.dtype == torch.int32 and torch.equal(got, by_torch(call, table, room, rule, shared))


@pytest.mark.thin(3)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shared", [False, True], ids=["group", "all"])
@pytest.mark.parametrize("rule", sorted(fused.SCORED))
@pytest.mark.parametrize("align,size", [(1, 0), (1, 1), (4, 0), (1, 2)])
def test_lists_of_a_decode_step(heads: str, shared: bool, rule: str, align: int, size: int) -> None:
    keys, closings, budget = ((131, (64, 111), 40), (97, (95,), 96), (77, (77,), 24))[size]
    call = made_call(HEADS[heads], keys, batch=1 + (size == 1))
    compare(call, made_table(call, closings), room_of(call, budget, align), rule, shared)


@pytest.mark.parametrize("rule", ["queries", "mass"])
def test_wide_heads_and_long_chunks(rule: str) -> None:
    call = made_call((6, 2), 517, d=80, batch=1)
    compare(call, made_table(call, (500,), rate=0.02), room_of(call, 100), rule, False)
    call = made_call((2, 1), 517, d=192, batch=1)
    compare(call, made_table(call, ()), room_of(call, 200), rule, False)  # all tokens in the open chunk


def test_soft_cap_and_bias() -> None:
    call = made_call((4, 2), 149, softcap=2.0, bias=torch.randn(1, 4, 149, device=DEVICE))
    compare(call, made_table(call, (120,)), room_of(call, 40), "queries", False)
    call = made_call(
        (4, 2),
        149,
        bias=torch.randn(2, 1, 149, device=DEVICE).masked_fill(torch.arange(149, device=DEVICE) < 30, -torch.inf),
    )
    compare(call, made_table(call, (120,)), room_of(call, 40), "queries", True)


def test_attention_far_below_the_best_is_still_told_apart() -> None:
    """Weights that underflow to 0 in a softmax over all keys have logarithms here."""
    call = made_call((2, 2), 131)
    call.k[:, :, :64] *= 40
    table, room = made_table(call, (120,)), room_of(call, 40)
    assert bool(fused.choose(fused.scores(call, table, room, "queries", False), table, room).diff().gt(0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", sorted(fused.SCORED))
def test_half_precision_keeps_as_much_attention(rule: str, dtype: torch.dtype) -> None:
    """Products are not rounded in between, so that lists differ where scores are close: they are worth as much."""
    exact = made_call((8, 2), 203, d=64)
    call = AttentionCall(0, 1, "decode", *(x.to(dtype) for x in (exact.q, exact.k, exact.k)), 0.125, rows=(0, 1))
    table, room = made_table(call, (64, 180)), room_of(call, 60)
    got = fused.choose(fused.scores(call, table, room, rule, False), table, room)
    exact.q, exact.k, table.moments = call.q.float(), call.k.float(), table.moments.float()
    want = by_torch(exact, table, room, rule, False)
    same = (got[..., :, None] == want[..., None, :]).any(-1).double().mean()
    assert float(same) > 0.97 and bool(got.diff().gt(0).all())


@pytest.mark.parametrize("align,budget,closings", [(1, 48, (150,)), (4, 100, (60, 61, 163)), (4, 48, (163,))])
@pytest.mark.parametrize("levels", [0, 3], ids=["scores", "ties"])
def test_lists_of_query_blocks_from_given_scores(
    align: int, budget: int, closings: tuple[int, ...], levels: int
) -> None:
    """Equal scores too: the earlier chunk goes first."""
    call = made_call((1, 1), 163)
    table = made_table(call, closings)
    table.starts = table.starts // align * align
    room = room_of(call, budget, align, 110, 16, local=7)
    starts, ends = table.spans
    score = torch.randn(2, 1, 4, starts.shape[1], device=DEVICE)
    score = (score * levels).round() * 0.5 if levels else score
    score[..., 3] = -torch.inf
    want = choose(score, starts, ends, replace(room, keys=1))  # few keys: all chunks are sorted, in order
    assert torch.equal(fused.choose(fused.Scores(score), table, room), want)


@pytest.mark.parametrize(
    "rotary", [Rotary(), Rotary(0.5), Rotary(tail=6), Rotary(interleaved=True), Rotary(0.5, 0, True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_moments_of_the_open_chunk(rotary: Rotary, dtype: torch.dtype) -> None:
    call = made_call((4, 2), 90, d=24)
    k = call.k.to(dtype)
    k[:, :, 70:] *= 100
    tables = [made_table(call, (), rotary) for _ in range(2)]
    for table in tables:
        table.moments = table.moments.to(dtype)
        torch.manual_seed(7)
        table.close(61, lambda start, stop: torch.rand(2, stop - start, device=DEVICE) < 0.2)
    for stop in (62, 63, 90):
        for table, add in zip(tables, (None, fused.measure_open), strict=True):
            table.grow(stop - 1, stop)
            table.measure(k[:, :, :stop], add=add)
        for one, other in ((tables[1].open, tables[0].open), (tables[1].moments, tables[0].moments)):
            torch.testing.assert_close(one, other, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-3)
        assert tables[1].added == stop


def test_scores_of_planes() -> None:
    for rotary in (Rotary(0.5), Rotary(tail=6), Rotary(interleaved=True)):
        call = made_call((4, 2), 131)
        compare(call, made_table(call, (100,), rotary), room_of(call, 40), "mass", False)


@pytest.mark.parametrize("radius", [0, 3, pytest.param(400, marks=pytest.mark.slow)])
def test_boundaries_beside_better_ones_are_dropped(radius: int) -> None:
    """Equal scores, ramps that settle one entry a round, rows without candidates."""
    score = (torch.randn(4, 301, device=DEVICE) * 5).round()
    score[:, ::5] = -torch.inf
    score[1] = torch.linspace(0, 1, 301, device=DEVICE)
    score[2] = -torch.inf
    score[3, 40:] = torch.inf
    assert torch.equal(fused.suppress(score, radius), boundaries.suppress(score, radius))
    assert torch.equal(fused.suppress(score[:, 1:], radius), boundaries.suppress(score[:, 1:], radius))


def test_a_kernel_that_drops_others_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust._dropped(torch.zeros(0, device=DEVICE)) is None
    right = fused.suppress
    monkeypatch.setattr(fused, "suppress", lambda score, radius: right(score, radius + 1))
    assert "other boundaries" in str(trust._dropped(torch.zeros(0, device=DEVICE)))


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", [*sorted(fused.SCORED), None])
def test_kernels_are_trusted_once_they_choose_right_in_small(
    rule: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = made_call((4, 2), 40, batch=1)
    call.q, call.k = call.q.to(dtype), call.k.to(dtype)
    table, room = made_table(call, (30,)), room_of(call, 20)
    assert trust.fault(call, table, room, rule, False) is None
    right = fused.choose

    def crooked(*given) -> Tensor:
        lists = right(*given)
        return torch.cat([lists[..., :20] * 0, lists[..., 20:]], -1)

    monkeypatch.setattr(fused, "choose", crooked)
    assert "small problem" in str(trust.fault(call, table, room, rule, False))


def test_lists_of_other_tokens_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    call = made_call((4, 2), 40, batch=1)
    right = fused.score_attention

    def without_normaliser(*given) -> fused.Scores:
        found = right(*given)
        return replace(found, parts=found.parts * 0)

    monkeypatch.setattr(fused, "score_attention", without_normaliser)
    found = trust.fault(call, made_table(call, (30,)), room_of(call, 20), "queries", False)
    assert found is not None and "are wrong" in found


def test_kernels_are_for_a_gpu_and_the_executor_that_is_theirs() -> None:
    gpu, cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    assert trust._there(gpu, None) and trust._there(gpu, "triton") and not trust._there(gpu, "torch")
    assert not trust._there(cpu, None) and not trust._there(cpu, "triton")


def test_what_kernels_cannot_run_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_there", lambda x, executor: True)

    def served(call: AttentionCall) -> bool:
        return trust.serves(call, made_table(call, (30,)), room_of(call, 20), "mass", False, "triton")

    call = made_call((4, 2), 40, batch=1)
    assert served(call) and served(made_call((4, 2), 40, d=256)) and not served(made_call((4, 2), 40, d=264))
    assert not served(replace(call, q=call.q.double()))
    monkeypatch.setattr(fused, "MOST_CHUNKS", 1)
    assert not served(call)
