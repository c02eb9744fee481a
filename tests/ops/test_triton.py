"""The triton executor against the dense float32 reference: in Triton's interpreter, on a GPU where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import RATIO, assert_close, inputs, layout_of, moved, random_map, selections
from tiny_llama import tiny_model

from hfpatch import patched
from hfpatch.core.selection import BlockMap, Causal, Rows, SinkWindow
from hfpatch.errors import ExecutorError
from hfpatch.ops import attend, triton_executor
from hfpatch.ops.call import Problem
from hfpatch.ops.torch_blocks import Plan

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "B1-H2_2-L63": (1, 2, 2, 63, 63),
    "B1-H2_1-L257": (1, 2, 1, 257, 257),
    "B1-H8_1-L37": (1, 8, 1, 37, 37),
    "B3-H4_1-chunk20of111": (3, 4, 1, 20, 111),
    "B3-H8_2-decode257": (3, 8, 2, 1, 257),
    "B1-H4_4-decode111": (1, 4, 4, 1, 111),
}
KINDS = [
    *("none", "window", "window_no_sink", "window_one", "window_zero", "window_wide", "blocks_even", "blocks_uneven"),
    *("blocks_shared", "blocks_per_head", "blocks_odd", "blocks_tall", "tokens"),
]


def compare(q, k, v, selection, **kw):
    """Compare with the reference on the same inputs."""
    kw = {"scale": q.shape[-1] ** -0.5, **kw}
    ref = attend(q, k, v, selection=selection, executor="reference", **kw)
    there = {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
    q, k, v = (t.to(DEVICE) for t in (q, k, v))
    got = attend(q, k, v, selection=moved(selection, q.device), executor="triton", **there)
    assert got.executor == "triton" and got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    assert_close("out", ref.out, got.out.cpu(), RATIO[q.dtype])
    assert_close("lse", ref.lse, got.lse.cpu(), RATIO[q.dtype])


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape, name):
    q, k, v = inputs(*SHAPES[shape])
    compare(q, k, v, selections(layout_of(q, k))[name])


@pytest.mark.parametrize("name", ["window", "blocks_uneven", "tokens"])
@pytest.mark.parametrize("shape", ["B3-H4_1-chunk20of111", "B3-H8_2-decode257"])
@pytest.mark.parametrize("extra", ["softcap", "sinks", "bias", "bias_head", "all"])
def test_extras(shape, name, extra):
    b, hq, hkv, lq, lk = SHAPES[shape]
    q, k, v = inputs(b, hq, hkv, lq, lk, dv=48 if extra == "all" else None)
    kw = {}
    if extra in ("softcap", "all"):
        kw["softcap"] = 1.5
    if extra in ("sinks", "all"):
        kw["sinks"] = torch.randn(hq) * 2
    if extra == "bias":
        kw["bias"] = torch.randn(1, 1, lk)
    if extra in ("bias_head", "all"):
        kw["bias"] = torch.randn(b, hq, lk)
    compare(q, k, v, selections(layout_of(q, k))[name], **kw)


@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (256, 256), (192, 128), (80, 80), (96, 40)])
@pytest.mark.parametrize("lq", [40, 1])
def test_head_dims(lq, d, dv):
    q, k, v = inputs(1, 2, 1, lq, 63, d=d, dv=dv)
    for name in ("window", "blocks_even"):
        compare(q, k, v, selections(layout_of(q, k))[name])


@pytest.mark.parametrize("name", ["none", "window", "blocks_even", "blocks_uneven", "tokens"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half(name, dtype):
    for b, hq, hkv, lq, lk in ((1, 2, 2, 111, 111), (3, 4, 1, 20, 63), (3, 8, 2, 1, 257)):
        q, k, v = inputs(b, hq, hkv, lq, lk, d=64, dtype=dtype)
        compare(q, k, v, selections(layout_of(q, k))[name], sinks=torch.randn(hq), softcap=3.0)


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_wider_than_a_tile(block):
    q, k, v = inputs(1, 2, 1, 150, 300, d=16)
    compare(q, k, v, random_map(layout_of(q, k), 1, block, block, 3, even=True))


@pytest.mark.parametrize("generation", [8, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_tiles_of_each_generation_of_cards(generation, biased, monkeypatch):
    monkeypatch.setattr(triton_executor, "generation", lambda device: generation)
    seen, of = set(), triton_executor.Tiles.of
    monkeypatch.setattr(triton_executor.Tiles, "of", lambda *sizes: seen.add(of(*sizes)) or of(*sizes))
    for d, block in ((128, 128), (128, 16), (256, 64)):
        q, k, v = inputs(1, 4, 1, 70, 90, d=d, dtype=torch.float16)
        more = {"bias": torch.randn(1, 4, 90)} if biased else {}
        compare(q, k, v, random_map(layout_of(q, k), 1, block, block, 3, even=True), **more)
    rows = {tiles.rows for tiles in seen}
    assert rows == ({32, 64, 128} if generation == 8 else {64, 128}) and all(tiles.warps in (4, 8) for tiles in seen)


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("name", ["none", "window", "blocks_uneven", "tokens"])
def test_split_over_keys(name, splits, monkeypatch):
    """Partial results of the splits, some of them without a key, are merged into the whole."""
    monkeypatch.setattr(triton_executor, "split_count", lambda programs, tiles, device: splits)
    for b, hq, hkv, lq, lk in ((2, 4, 2, 1, 257), (1, 2, 1, 7, 111)):
        q, k, v = inputs(b, hq, hkv, lq, lk)
        compare(q, k, v, selections(layout_of(q, k))[name], sinks=torch.randn(hq) if lq == 1 else None)


def test_split_count_fills_the_device():
    cpu = torch.device("cpu")
    assert triton_executor.split_count(100, 1000, cpu) == 1
    assert triton_executor.split_count(1, 1000, cpu) == 16
    assert triton_executor.split_count(3, 1000, cpu) == 4
    assert triton_executor.split_count(1, 8, cpu) == 2
    assert triton_executor.split_count(1, 3, cpu) == 1


@pytest.mark.parametrize("layout", ["contiguous", "static", "fused", "columns"])
def test_strides(layout):
    q, k, v = inputs(2, 2, 1, 63, 63, layout=layout)
    for name in ("window", "blocks_even"):
        compare(q, k, v, selections(layout_of(q, k))[name])


def test_offsets_beyond_32_bits():
    """Heads and block lists so far apart in memory that their distance in elements is no 32-bit number."""
    far = 2**28 + 2**26
    q, k, v = inputs(1, 8, 8, 5, 63, d=16, dtype=torch.float16)
    room = torch.empty(8 * far, dtype=torch.float16, device=DEVICE)  # a few pages of it are touched
    apart = room.as_strided(q.shape, (0, far, 16, 1)).copy_(q)
    sel = random_map(layout_of(q, k), 8, 16, 16, 3)
    lists = torch.empty(8 * far, dtype=torch.int16, device=DEVICE)
    width = sel.indices.shape[-1]
    indices = lists.as_strided(sel.indices.shape, (0, far, width, 1)).copy_(sel.indices)
    want = attend(q, k, v, selection=sel, scale=0.25, executor="reference")
    k, v, counts = (t.to(DEVICE) for t in (k, v, sel.counts))
    chosen = BlockMap(indices, counts, 16, 16)
    got = attend(apart, k, v, selection=chosen, scale=0.25, executor="triton")
    assert_close("out", want.out, got.out.cpu(), RATIO[torch.float16])
    assert_close("lse", want.lse, got.lse.cpu(), RATIO[torch.float16])


def test_prompts_of_other_lengths_compile_nothing_anew():
    script = Path(__file__).parents[2] / "benchmarks" / "ops" / "triton_resources.py"
    done = subprocess.run([sys.executable, script, "--lengths"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("4 attention kernels, 1 merge kernel, 1 list kernel")


def test_long_lists_are_put_in_order_piece_by_piece():
    q, k, v = (t.to(DEVICE) for t in inputs(1, 2, 1, 40, 1600, d=16))
    indices = torch.stack([torch.randperm(1600)[:1500] for _ in range(3)])[None, None].to(DEVICE)
    sel = BlockMap(indices, torch.tensor([[[1500, 1100, 3]]], device=DEVICE), 16, 1)
    order, full, listed = triton_executor._ordered(sel, layout_of(q, k))
    want = Plan.of(sel, Problem(q, k, v, sel, 0.25), 1)
    assert torch.equal(full, want.full.int()) and torch.equal(listed, (want.full + want.partial).int())
    for n, count in enumerate(listed.flatten().tolist()):
        assert torch.equal(order[0, 0, n, :count], want.order[0, 0, n, :count].int())


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU: it compiles for that one")
def test_compiles_without_spills_for_cards_that_are_not_here():
    script = Path(__file__).parents[2] / "benchmarks" / "ops" / "triton_resources.py"
    asked = ["--dtype", "float16", "--only", "decode pages D64", "--table"]
    done = subprocess.run([sys.executable, script, *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, head, _, row = done.stdout.splitlines()
    assert head == "| kernel | dtype | sm_80 | sm_90 | sm_100 |"
    assert row.startswith("| decode pages D64 | float16 | ") and row.count(" / 0 / ") == 3


def test_ranges_of_queries():
    q, k, v = inputs(2, 2, 1, 63, 80)
    blocks = random_map(layout_of(q, k).rows(0, 30), 1, 16, 16, 3, even=True)
    compare(q, k, v, Rows([(30, blocks), (40, SinkWindow(2, 9)), (63, Causal())]))


def test_rows_without_keys():
    q, k, v = inputs(1, 2, 2, 63, 63)
    sel = random_map(layout_of(q, k), 2, 16, 16, 4)
    sel.counts[:, :, 2] = 0
    compare(q, k, v, sel)
    compare(q, k, v, sel, sinks=torch.randn(2))


def test_says_what_it_cannot_run(monkeypatch):
    q, k, v = (t.to(DEVICE) for t in inputs(1, 2, 1, 5, 7))

    def refused(says, **change):
        args = {"q": q, "k": k, "v": v, "selection": None, "scale": 1.0, **change}
        with pytest.raises(ExecutorError, match=f"'triton' cannot run this call: {says}"):
            attend(**args, executor="triton")

    refused("it does not run a Predicate selection", selection=selections(layout_of(q, k))["predicate"])
    refused("it has no backward pass", q=q.clone().requires_grad_())
    refused("it does not run torch.float64", **{n: t.double() for n, t in (("q", q), ("k", k), ("v", v))})
    refused("heads of 320 are wider than 256", v=v.repeat(1, 1, 1, 10))
    monkeypatch.setattr(triton_executor, "find_spec", lambda name: None)
    refused("Triton is not installed; run `pip install 'hfpatch\\[triton\\]'`")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        refused("it needs a GPU")


def test_report_shows_it():
    model = tiny_model().to(DEVICE)
    ids = torch.arange(2, 40, device=DEVICE)[None]
    with torch.no_grad():
        with patched(model, "streaming", sink=2, window=9, executor="torch"):
            want = model(ids).logits
        with patched(model, "streaming", sink=2, window=9, executor="triton") as patch:
            got = model(ids).logits
            assert all(set(line.stats.executors) == {"triton"} for line in patch.report().lines)
    assert_close("logits", want, got, 1e-4)
