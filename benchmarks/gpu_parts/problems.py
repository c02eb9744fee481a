"""The problems of part 1: every kind of selection, head size, group, extra, length and layout, one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from helpers import inputs, random_map
from torch import Tensor

from gpu_parts.context import Context
from hfpatch.core.selection import Causal, Layout, Rows, Selection, SinkWindow
from hfpatch.ops.call import Problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ("causal", "window", "blocks128", "blocks64", "blocks16", "tokens", "per head", "ragged", "rows")
TESTED = 2085
LONG = 131072
KEPT = {"blocks128": 5, "blocks64": 9, "blocks16": 24, "tokens": 300}


@dataclass(frozen=True)
class Spec:
    """A problem to be made: sizes, kind of selection, extras, and how q, k and v lie in memory."""

    kind: str
    hq: int = 8
    hkv: int = 2
    lq: int = TESTED
    lk: int = TESTED
    d: int = 128
    dv: int = 128
    dtype: torch.dtype = BF16
    extras: tuple[str, ...] = ()
    layout: str = "transposed"
    batch: int = 1

    @property
    def name(self) -> str:
        """What the rows call it."""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.kind} B{self.batch} H{self.hq}/{self.hkv} L{self.lq}/{self.lk} D{self.d}/{self.dv} {dtype}"
        return " ".join(word for word in (sizes, *self.extras, self.lies) if word)

    @property
    def lies(self) -> str:
        """How q, k and v lie in memory, where that is unusual."""
        return "" if self.layout == "transposed" else self.layout

    def alike(self) -> Problem:
        """A small problem of the same family, on the CPU."""
        return _small(self).make(torch.device("cpu"))

    def make(self, device: torch.device) -> Problem:
        """The problem with random numbers, on the device."""
        torch.manual_seed(0)
        with device:
            q, k, v = inputs(
                self.batch, self.hq, self.hkv, self.lq, self.lk, self.d, self.dv, self.dtype, self.layout
            )  # fmt: skip
            at = Layout(self.batch, self.hq, self.hkv, self.lq, self.lk, q.device)
            return Problem(q, k, v, _selection(self.kind, at), self.d**-0.5, **_extras(self, at))


def _extras(spec: Spec, at: Layout) -> dict[str, Tensor | float]:
    made: dict[str, Tensor | float] = {"softcap": 3.0} if "softcap" in spec.extras else {}
    if "sinks" in spec.extras:
        made["sinks"] = torch.randn(at.Hq)
    if "bias" in spec.extras:
        made["bias"] = torch.randn(1, at.Hq, at.Lk)
    return made


def _selection(kind: str, at: Layout) -> Selection:
    third = at.Lq // 3
    if kind == "causal":
        return Causal()
    if kind == "window":
        return SinkWindow(4, max(9, at.Lk // 5))
    if kind == "per head":
        return random_map(at, at.Hq, 64, 64, 6, rows=at.B)
    if kind == "ragged":
        return random_map(at, at.Hkv, 64 if at.Lq > 64 else 16, 32, 9, rows=at.B)
    if kind == "rows":
        blocks = random_map(at.rows(0, third), at.Hkv, 64, 64, 5, even=True)
        return Rows([(third, blocks), (2 * third, SinkWindow(4, 300)), (at.Lq, Causal())])
    block = 1 if kind == "tokens" else int(kind.removeprefix("blocks"))
    return random_map(at, at.Hkv, 16 if block == 1 else block, block, KEPT[kind], even=True)


def specs(context: Context) -> list[Spec]:
    """All problems, each once."""
    found = [*_bases(), *_sizes(), *_decodes(), *_dtypes(), *_longs()]
    return _cover([_small(s) for s in found]) if context.dry else list(dict.fromkeys(found))


def _cover(found: list[Spec]) -> list[Spec]:
    """So many of them that every kind, extra, layout, width, dtype, phase and number of heads is there."""
    seen: set[tuple[str, Any]] = set()
    kept = []
    for spec in found:
        new = {(f.name, getattr(spec, f.name)) for f in fields(spec)} - seen
        if new:
            kept.append(spec)
            seen |= new
    return kept


def _bases() -> Iterator[Spec]:
    yield from (Spec(kind) for kind in KINDS)
    for extra in ("sinks", "softcap", "bias"):
        yield from (Spec(kind, extras=(extra,)) for kind in ("window", "blocks128"))
    yield Spec("blocks64", extras=("sinks", "softcap", "bias"))
    yield from (Spec(kind, layout=layout) for layout in ("fused", "static") for kind in ("window", "blocks128"))


def _sizes() -> Iterator[Spec]:
    for d, dv in ((64, 64), (96, 96), (192, 128), (256, 256)):
        yield from (Spec(kind, d=d, dv=dv) for kind in ("causal", "window", "blocks128"))
    for hq, hkv in ((2, 2), (7, 1)):
        yield from (Spec(kind, hq=hq, hkv=hkv) for kind in ("window", "blocks128", "tokens"))


def _decodes() -> Iterator[Spec]:
    for lq in (1, 17):
        yield from (Spec(kind, lq=lq) for kind in ("causal", "window", "blocks128", "blocks16", "tokens", "per head"))
    yield Spec("blocks16", lq=1, hq=28, hkv=4)


def _dtypes() -> Iterator[Spec]:
    for dtype in (FP16, FP32):
        yield from (Spec(kind, dtype=dtype) for kind in ("causal", "window", "blocks128", "tokens"))
        yield from (Spec(kind, dtype=dtype, d=64, dv=64) for kind in ("window", "blocks64"))
        yield Spec("blocks16", dtype=dtype, lq=1)
    yield Spec("blocks64", dtype=FP32, d=256, dv=256)


def _longs() -> Iterator[Spec]:
    long = Spec("causal", hq=32, hkv=8, lq=LONG, lk=LONG, batch=2)
    yield from (replace(long, kind=kind) for kind in ("causal", "window", "blocks128"))
    yield from (replace(long, kind=kind, lq=1) for kind in ("causal", "blocks16", "tokens"))


def _small(spec: Spec) -> Spec:
    """The same problem at a size that Triton's interpreter runs in no time."""
    groups = spec.hq // spec.hkv
    lk = 70 if spec.lk == LONG else 45
    lq = lk if spec.lq == spec.lk else min(spec.lq, 17)
    return replace(spec, hq=groups, hkv=1, lq=lq, lk=lk)
