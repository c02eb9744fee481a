"""Inputs, selections and comparisons shared by the tests of the executors."""

from dataclasses import replace

import torch
from torch import Tensor

from hfpatch.core.selection import BlockMap, Both, Causal, Layout, Predicate, Rows, Selection, SinkWindow
from hfpatch.ops import attend

RATIO = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-5}


def assert_close(name: str, ref: Tensor, got: Tensor, ratio: float) -> None:
    """Fail unless the error of the named tensor is below `ratio` of the reference's size, infinities in place."""
    assert ref.shape == got.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    ref, got = ref.double(), got.double()
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} NaN"
    assert torch.equal(ref.isinf(), got.isinf()), f"{name}: infinities in other places"
    ref, got = ref.masked_fill(ref.isinf(), 0), got.masked_fill(got.isinf(), 0)
    error = ((ref - got).square().mean().sqrt() / (ref.square().mean().sqrt() + 1e-12)).item()
    worst = ((ref - got).abs().max() / (ref.abs().max() + 1e-12)).item()
    assert error < ratio, f"{name}: relative error {error:.2e}, allowed {ratio:.0e}"
    assert worst < 5 * ratio, f"{name}: worst error {worst:.2e} of the largest value, allowed {5 * ratio:.0e}"


def inputs(b, hq, hkv, lq, lk, d=32, dv=None, dtype=torch.float32, layout="transposed"):
    """q, k, v as Transformers hands them over; a static layout is a slice of a longer buffer."""
    dv = dv or d

    def make(h, n, width):
        if layout == "contiguous":
            t = torch.randn(b, h, n, width)
        elif layout == "static":
            t = torch.randn(b, h, n + 19, width)[:, :, :n]
        elif layout == "fused":
            t = torch.randn(b, n, h, width + 3)[..., 2 : width + 2].transpose(1, 2)
        elif layout == "columns":
            t = torch.randn(b, h, width, n).mT
        else:
            t = torch.randn(b, n, h, width).transpose(1, 2)
        return t.to(dtype) if dtype != torch.float32 else t

    return make(hq, lq, d), make(hkv, lk, d), make(hkv, lk, dv)


def random_map(
    at: Layout, heads: int, block_q: int, block_k: int, keep: int, rows: int = 1, even: bool = False
) -> BlockMap:
    """Random key blocks of each query block, its own ones included when `even`; junk past the counts."""
    nq, nk = -(-at.Lq // block_q), -(-at.Lk // block_k)
    width = min(keep, nk)
    score = torch.rand(rows, heads, nq, nk)
    last = (at.off + torch.arange(nq) * block_q + block_q - 1).clamp(max=at.Lk - 1) // block_k
    if even:
        score = score.masked_fill(torch.arange(nk) > last[:, None], -1.0)
        score = score.scatter(-1, last[:, None].expand(rows, heads, nq, 1), 2.0)
        counts = (last + 1).clamp(max=width).expand(rows, heads, nq)
    else:
        counts = torch.randint(0, width + 1, (rows, heads, nq))
    indices = score.topk(width, dim=-1).indices
    junk = torch.arange(width) >= counts[..., None]
    return BlockMap(indices.masked_fill(junk, 10**6).int(), counts, block_q, block_k)


def own_tokens(at: Layout, heads: int, block_q: int, more: int) -> BlockMap:
    """Token lists of each query block: its own tokens and, where there are as many, `more` random ones before it."""
    nq = -(-at.Lq // block_q)
    indices, counts = torch.zeros(1, heads, nq, block_q + more, dtype=torch.int), torch.zeros(1, heads, nq)
    for h in range(heads):
        for n in range(nq):
            first, last = at.off + n * block_q, min(at.off + (n + 1) * block_q, at.Lk)
            chosen = torch.cat([torch.randperm(first)[:more], torch.arange(first, last)])
            indices[0, h, n, : len(chosen)], counts[0, h, n] = chosen[torch.randperm(len(chosen))], len(chosen)
    return BlockMap(indices, counts.int(), block_q, 1)


def selections(at: Layout) -> dict[str, Selection | None]:
    """One of every kind, sized for the layout."""
    dilated = Predicate(lambda h, i, j: ((i - j) % (h + 2) == 0) | (j < 2))
    blocks = random_map(at, at.Hkv, 16, 16, 3, even=True)
    rows = Rows([(at.Lq // 3, SinkWindow(2, 9)), (at.Lq // 2, Causal()), (at.Lq, dilated)])
    return {
        "none": None,
        "causal": Causal(),
        "window": SinkWindow(4, 28),
        "window_no_sink": SinkWindow(0, 17),
        "window_one": SinkWindow(3, 1),
        "window_zero": SinkWindow(3, 0),
        "window_wide": SinkWindow(4, 10_000),
        "predicate": dilated,
        "hidden": Predicate(lambda h, i, j: (i % 3 > 0) & (j % 5 == 0) & (j > 6)),
        "blocks_even": blocks,
        "blocks_uneven": random_map(at, at.Hkv, 16, 8, 9, rows=at.B),
        "blocks_shared": random_map(at, 1, 32, 16, 6),
        "blocks_per_head": random_map(at, at.Hq, 8, 16, 4, rows=at.B),
        "blocks_odd": random_map(at, 1, 13, 7, 5, even=True),
        "blocks_tall": random_map(at, at.Hkv, 64, 4, 20),
        "tokens": random_map(at, at.Hkv, 16, 1, 30),
        "tokens_own": own_tokens(at, at.Hkv, 16, 20),
        "rows": rows,
        "both": Both(blocks, dilated),
    }


NAMES = list(selections(Layout(1, 2, 1, 8, 8, torch.device("cpu"))))


def moved(selection: Selection | None, device: torch.device) -> Selection | None:
    """The selection with its tensors on a device."""
    if isinstance(selection, Rows):
        return Rows([(stop, moved(part, device)) for stop, part in selection.parts])
    if isinstance(selection, Both):
        return Both(*(moved(part, device) for part in (selection.first, selection.second)))
    if not isinstance(selection, BlockMap):
        return selection
    return replace(selection, indices=selection.indices.to(device), counts=selection.counts.to(device))


def layout_of(q: Tensor, k: Tensor) -> Layout:
    return Layout(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.device)


def check(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, ratio: float | None = None, **kw) -> None:
    """Compare the torch executor with the reference on the same inputs."""
    kw = {"scale": q.shape[-1] ** -0.5, **kw}
    ref = attend(q, k, v, selection=selection, executor="reference", **kw)
    got = attend(q, k, v, selection=selection, executor="torch", **kw)
    assert got.out.dtype == q.dtype and got.lse.dtype == torch.float32
    ratio = ratio or RATIO[q.dtype]
    assert_close("out", ref.out, got.out, ratio)
    assert_close("lse", ref.lse, got.lse, ratio)
