"""`sampled` against its plain-loop definition."""

import pytest
import torch
from method_calls import SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import forced, heads_of, own, room, tiles_of
from torch import Tensor

from hfpatch.core import sampling as module
from hfpatch.core.call import AttentionCall
from hfpatch.errors import ConfigError

SMALL = {"L63-mha": (1, 4, 4, 63, 63), "L111-gqa4": (2, 8, 2, 111, 111), "chunk50of161": (1, 4, 2, 50, 161)}


def attention(call: AttentionCall, b: int, h: int, i: int, pool: int) -> Tensor:
    """Weights `[Lk]` of query i, those of a mean spread over its keys."""
    k, pos = call.k[b, h // call.groups], call.off + i
    whole = (pos + 1) // pool
    out = torch.zeros(call.Lk)
    if whole:
        means = k[: whole * pool].unflatten(0, (whole, pool)).mean(1)
        s = call.scale * means @ call.q[b, h, i]
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        out[: whole * pool] = s.softmax(0).repeat_interleave(pool) / pool
    return out


def reference(
    call, *, queries, pool, top_p, floor, budget, block_q, block_k, sink_blocks, window_blocks, head_sharing
):
    """Bool `[B, Hq, Lq, Lk]`, tile by tile and block by block."""
    keep = torch.zeros(call.B, call.Hq, call.Lq, call.Lk, dtype=torch.bool)
    for b in range(call.B):
        for heads in heads_of(call, head_sharing):
            for tile in tiles_of(call, block_q):
                n = min(queries, block_q)
                picks = [tile[max((m + 1) * len(tile) // n - 1, 0)] for m in range(n)]
                weights = sum(attention(call, b, h, i, pool) for h in heads for i in picks) / (len(heads) * n)
                last = call.off + tile[-1]
                blocks = [list(range(a, min(a + block_k, call.Lk))) for a in range(0, call.Lk, block_k)]
                mass = {j: float(weights[keys].sum()) for j, keys in enumerate(blocks) if keys[0] <= last}
                mine = len(own(call, tile, blocks))
                most = None if budget is None else room(call, tile, blocks, budget, floor)
                always = forced(call, tile, blocks, sink_blocks, window_blocks, most)
                order = sorted(mass, key=lambda j: (j not in always, -mass[j]))
                count, so_far = 0, 0.0
                while count < len(order) and so_far < top_p * sum(mass.values()) - 1e-7:
                    so_far, count = so_far + mass[order[count]], count + 1
                count = max(count, len(always), min(mine + room(call, tile, blocks, 0.0, floor), len(mass)))
                if most is not None:
                    count = min(count, mine + most)
                for j in order[:count]:
                    keys = torch.tensor(blocks[j])
                    for h in heads:
                        for i in tile:
                            keep[b, h, i, keys[keys <= call.off + i]] = True
    return keep


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}], ids=["plain", "softcap"])
def test_equals_the_formula(shape, share, extra):
    call = make_call(SMALL[shape], dv=24, **extra)
    for queries, pool, bq, bk, floor, budget in [
        (4, 1, 16, 16, 0, None), (1, 1, 8, 4, 24, 0.3), (3, 4, 32, 8, 16, 40), (99, 2, 8, 16, 0, 0.25)
    ]:  # fmt: skip
        settings = dict(queries=queries, pool=pool, top_p=0.7, floor=floor, budget=budget, block_q=bq, block_k=bk)
        settings |= dict(sink_blocks=1, window_blocks=1, head_sharing=share)
        method = make_method("sampled", min_length=0, **settings)
        assert torch.equal(chosen_mask(method, call), reference(call, **settings))
        check_executors(method, call)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep_all", [{"top_p": 1.0}, {"floor": 1 << 20}], ids=["top_p", "floor"])
def test_keep_all_is_dense(shape, keep_all):
    call = make_call(SHAPES[shape])
    keep = chosen_mask(make_method("sampled", min_length=0, block_q=16, block_k=8, **keep_all), call)
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    assert torch.equal(keep, want.expand_as(keep))


def test_all_queries_choose_as_the_oracle():
    """With every query of a tile and no pooling the scores are the true mass of the blocks."""
    call = make_call(SHAPES["L111-gqa4"])
    method = make_method("sampled", min_length=0, queries=16, block_q=16, block_k=16)
    grid = method.grid(call)
    scores = method.scores(call, grid)
    s = call.scale * call.q @ call.k.repeat_interleave(call.groups, 1).mT
    weights = s.masked_fill(call.k_pos > call.q_pos[:, None], -torch.inf).softmax(-1)
    weights = torch.nn.functional.pad(weights, (0, 1, 0, 1))[:, :, :112].unflatten(-1, (7, 16)).sum(-1)
    mass = weights[:, :, :96].unflatten(2, (6, 16)).mean(3).unflatten(1, (call.Hkv, -1)).mean(2)
    torch.testing.assert_close(scores[:, :, :6], mass, rtol=1e-5, atol=1e-6)


def test_chunking_changes_nothing(monkeypatch):
    call = make_call(SHAPES["L257-mqa8"])
    method = make_method("sampled", min_length=0, queries=3, pool=2, block_q=16, block_k=16, top_p=0.6, floor=0)
    want = chosen_mask(method, call)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert torch.equal(chosen_mask(method, call), want)


def test_a_needle_that_one_query_looks_for_is_found():
    """Its tile's mean query points elsewhere: block_topk drops the block that the last query attends to."""
    call = make_call((1, 1, 1, 256, 256), dim=32)
    call.q.mul_(0.1)
    call.k[0, 0, 40] = torch.nn.functional.one_hot(torch.tensor(3), 32) * 8.0
    call.k[0, 0, 32:48].sub_(call.k[0, 0, 32:48].mean(0))
    call.q[0, 0, 255] = torch.nn.functional.one_hot(torch.tensor(3), 32) * 8.0
    common = dict(min_length=0, block_q=64, block_k=16, budget=96, sink_blocks=0, window_blocks=1)
    assert chosen_mask(make_method("sampled", floor=0, top_p=0.99, **common), call)[0, 0, 255, 40]
    assert not chosen_mask(make_method("block_topk", **common), call)[0, 0, 255, 40]


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="must divide"):
        make_method("sampled", pool=24)


@pytest.mark.parametrize("length", [25, 32, 49])
def test_pools_that_do_not_divide_the_blocks_of_a_short_call(length):
    """Blocks are cut to the call; means of keys must fit them all the same."""
    call = make_call((1, 4, 2, length, length))
    found = make_method("sampled", block_k=48, pool=24, min_length=0, block_q=16).select(call)
    assert found is None or found.mask(call.layout)[..., -1, -1].all()
