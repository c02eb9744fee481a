"""`block_topk` against its plain-loop definition."""

import pytest
import torch
from method_calls import SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import block_topk

from hfpatch.core.blocks import Grid, block_means
from hfpatch.errors import ConfigError
from hfpatch.methods.block_topk import pooled_weights

SIZES = [(16, 16), (32, 8), (8, 16)]


@pytest.mark.thin(2)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", ["group", "head", "all"])
@pytest.mark.parametrize("budget,floor", [(48, 0), (20, 9), (0.4, 0), (0.3, 40)])
def test_equals_the_formula(shape, share, budget, floor):
    call = make_call(SHAPES[shape], dv=24)
    for bq, bk in SIZES:
        own = dict(budget=budget, floor=floor, block_q=bq, block_k=bk, sink_blocks=1, window_blocks=2)
        own["head_sharing"] = share
        method = make_method("block_topk", min_length=0, **own)
        assert torch.equal(chosen_mask(method, call), block_topk(call, **own))
        check_executors(method, call)


@pytest.mark.parametrize("shape", SHAPES)
def test_keep_all_is_dense(shape):
    call = make_call(SHAPES[shape])
    want = torch.ones(call.Lq, call.Lk, dtype=torch.bool).tril(call.off)
    for settings in ({"budget": 1.0}, {"budget": 10**6}, {"top_p": 1.0}):
        keep = chosen_mask(make_method("block_topk", min_length=0, block_q=16, block_k=8, **settings), call)
        assert torch.equal(keep, want.expand_as(keep))


def test_short_calls_are_dense():
    assert make_method("block_topk", budget=16).select(make_call(SHAPES["L257-mqa8"])) is None
    assert "2048" in make_method("block_topk").notes()[0]


def test_bands_follow_the_paper():
    call = make_call(SHAPES["L257-mqa8"])
    s = dict(block_q=16, block_k=16, sink_blocks=1, window_blocks=1, head_sharing="head", min_length=0, top_p=0.8)
    method = make_method("block_topk", bands=True, high=0.5, low=0.75, **s)
    grid = Grid(call.layout, 16, 16)
    q, k = block_means(call.q, 16), block_means(call.k, 16)
    got = pooled_weights(q, k, grid, method.split(call))
    bands = [[*range(4), *range(8, 12)], [*range(2, 8), *range(10, 16)]]
    kept = torch.zeros(1, 8, grid.nq, grid.nk, dtype=torch.bool)
    for channels, weights in zip(bands, got, strict=True):
        for h in range(8):
            qz, kz = q[0, h][:, channels], k[0, 0][:, channels]
            rms = [float(x.square().mean().sqrt()) for x in (qz, q[0, h], kz, k[0, 0])]
            tau = (len(channels) / 16) ** 0.5 * rms[0] / rms[1] * rms[2] / rms[3]
            for n in range(1, grid.nq):
                p = (qz[n] @ kz[:n].T / (len(channels) ** 0.5 * tau)).softmax(-1)
                torch.testing.assert_close(weights[0, h, n, :n], p, rtol=1e-4, atol=1e-6)
                mass, order = 0.0, p.argsort(descending=True).tolist()
                for m in order:
                    if mass < 0.8:
                        kept[0, h, n, m] = True
                    mass += float(p[m])
    kept[..., 0] = True
    kept |= torch.eye(grid.nq, dtype=torch.bool)
    assert torch.equal(method.select(call).block_mask(call.layout), kept)


def test_budget_out_of_range():
    with pytest.raises(ConfigError, match="share of the keys"):
        make_method("block_topk", budget=1.5)
