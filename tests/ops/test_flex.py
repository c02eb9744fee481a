"""The flex executor: its block masks against the selections, its compilations counted, its results on a GPU."""

import pytest
import torch
from helpers import RATIO, assert_close, inputs, layout_of, moved, random_map, selections

from hfpatch.core.selection import Causal, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops import attend, flex_executor
from hfpatch.ops.call import Problem

KINDS = ["causal", "window", "window_no_sink", "window_one", "window_zero", "window_wide", "sink_wide"]
KINDS += ["blocks_even", "blocks_uneven", "blocks_shared", "blocks_per_head", "blocks_odd", "tokens"]
SHAPES = {
    "L63": (1, 2, 2, 63, 63),
    "L257": (1, 8, 1, 257, 257),
    "chunk111of400": (3, 4, 2, 111, 400),
}


def problem(shape, name):
    """A problem of a shape, with one of the selections."""
    q, k, v = inputs(*shape, d=16)
    sel = SinkWindow(140, 20) if name == "sink_wide" else selections(layout_of(q, k))[name]
    return Problem(q, k, v, sel, 0.25)


def tokens_of(counts, indices, mask, at):
    """Bool `[B, H, Lq, Lk]` of the tokens in the listed blocks."""
    (bq, bk), (b, h, nq, width) = mask.BLOCK_SIZE, indices.shape
    nk = -(-at.Lk // bk)
    slots = torch.where(torch.arange(width) < counts[..., None], indices, nk).long()
    blocks = torch.zeros(b, h, nq, nk + 1, dtype=torch.int).scatter_add_(-1, slots, torch.ones_like(slots).int())
    blocks = blocks[..., :nk]
    assert blocks.max() <= 1, "a block is listed twice"
    return (blocks > 0).repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, : at.Lq, : at.Lk]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_mask_is_the_selection(shape, name):
    p = problem(SHAPES[shape], name)
    mask, at = flex_executor.block_mask(p), p.at
    full = tokens_of(mask.full_kv_num_blocks, mask.full_kv_indices, mask, at)
    partial = tokens_of(mask.kv_num_blocks, mask.kv_indices, mask, at)
    i, j = torch.arange(at.Lq)[:, None], torch.arange(at.Lk)[None]
    want = p.selection.mask(at)
    assert not (full & partial).any()
    assert torch.equal(
        (full | (partial & mask.mask_mod(0, 0, i, j))).expand(at.B, at.Hq, -1, -1), want.expand(at.B, at.Hq, -1, -1)
    )


def test_windows_have_unmasked_blocks():
    p = problem((1, 2, 1, 1500, 1500), "causal")
    mask = flex_executor.block_mask(p)
    assert mask.full_kv_num_blocks[0, 0].tolist() == list(range(12)) and (mask.kv_num_blocks == 1).all()
    inputs_of_window = Problem(p.q, p.k, p.v, SinkWindow(4, 600), 0.25)
    assert flex_executor.block_mask(inputs_of_window).full_kv_num_blocks.max() == 3


def test_one_compilation_serves_all_lengths(monkeypatch):
    """Traced without a code generator (the CPU's gives no lse): lengths, offsets and settings add no graph."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(flex_executor, "compiled", lambda: compiled)
    seen = []
    for lq, lk, sink, window in ((300, 300, 4, 200), (200, 500, 4, 200), (700, 700, 9, 150), (437, 1000, 2, 333)):
        q, k, v = inputs(1, 4, 2, lq, lk, d=16)
        sel = SinkWindow(sink, window)
        out, lse = flex_executor.run(Problem(q, k, v, sel, 0.25))
        ref = attend(q, k, v, selection=sel, scale=0.25, executor="reference")
        assert_close("out", ref.out, out, 1e-5)
        assert_close("lse", ref.lse, lse, 1e-5)
        seen.append(counter.frame_count)
    extras = {"softcap": 1.5, "sinks": torch.randn(4), "bias": torch.randn(1, 4, 1000)}
    out, lse = flex_executor.run(Problem(q, k, v, sel, 0.25, **extras))
    ref = attend(q, k, v, selection=sel, scale=0.25, executor="reference", **extras)
    assert_close("out", ref.out, out, 1e-5)
    assert_close("lse", ref.lse, lse, 1e-5)
    torch.compiler.reset()
    assert seen[-1] <= 2 and seen[-1] == seen[1], seen


def test_says_what_it_cannot_run():
    q, k, v = inputs(1, 2, 1, 5, 7)
    with pytest.raises(
        ExecutorError, match="'flex' cannot run this call: flex_attention compiled for the CPU gives no log"
    ):
        attend(q, k, v, selection=None, scale=1.0, executor="flex")
    if torch.cuda.is_available():
        q, k, v = (t.cuda() for t in (q, k, v))
        pages = moved(random_map(layout_of(q, k), 1, 1, 16, 1), q.device)
        for says, sel, lq in (("several queries", None, 1), ("multiples of 16", pages, 5)):
            with pytest.raises(ExecutorError, match=says):
                attend(q[:, :, :lq], k, v, selection=sel, scale=1.0, executor="flex")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "window", "blocks_even", "blocks_uneven"])
def test_on_a_gpu(name, dtype):
    for lq in (257, 111):
        q, k, v = (t.cuda() for t in inputs(2, 8, 2, lq, 257, d=64, dtype=dtype))
        sel = {"causal": Causal(), "window": SinkWindow(4, 100)}.get(name)
        sel = sel or moved(random_map(layout_of(q, k), 2, 64, 64, 3, even=name == "blocks_even"), q.device)
        for kw in (
            {},
            {"softcap": 2.0},
            {"sinks": torch.randn(8, device="cuda")},
            {"bias": torch.randn(2, 8, 257, device="cuda")},
        ):
            ref = attend(q, k, v, selection=sel, scale=0.125, executor="reference", **kw)
            got = attend(q, k, v, selection=sel, scale=0.125, executor="flex", **kw)
            assert_close("out", ref.out, got.out, max(RATIO[dtype], 2e-3))
            assert_close("lse", ref.lse, got.lse, max(RATIO[dtype], 2e-3))
