"""The libraries flash-attn 2, 3 and 4 behind one call, and which of them is installed for a card.

Written against the signatures of `flash_attn.flash_attn_func` of 2.8.4 (soft-cap since 2.6), of
`flash_attn_interface.flash_attn_func` of 3.0.0 and of `flash_attn.cute.flash_attn_func` of 4.0.0.beta, all of
Dao-AILab/flash-attention at 0251105. All take `q [B, Lq, Hq, D]`, `k [B, Lk, Hkv, D]`, `v [B, Lk, Hkv, Dv]`, put the
diagonal in the lower right corner, count a window's left side without the query's own token, and can return
`lse [B, Hq, Lq]` in float32, natural log, of soft-capped logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hfpatch.ops.merge import Part

Attention = Callable[..., Any]
LATENT = (192, 128)  # key and value width of DeepSeek's models


@dataclass(frozen=True)
class Ask:
    """What a call is to compute: causality, or all keys; a window of the last `window` keys, or no limit."""

    scale: float
    softcap: float | None
    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Library:
    """One of the libraries: its module, the cards it is for (major compute capability), widths of heads, its call."""

    name: str
    module: str
    cards: frozenset[int]
    fits: Callable[[int, int, int], bool]
    call: Callable[[Attention, Tensor, Tensor, Tensor, Ask], Part]

    def run(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask) -> Part:
        """`out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` of `q [B, Hq, Lq, D]`, `k [B, Hkv, Lk, D]`, `v` likewise."""
        attention = attention_of(self.module)
        assert attention is not None
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.call(attention, q, k, v, ask)


@cache
def attention_of(module: str) -> Attention | None:
    """The library's `flash_attn_func`; None where it is not installed or does not load."""
    try:
        found: Attention = import_module(module).flash_attn_func
    except (ImportError, OSError, AttributeError):
        return None
    return found


def card(device: torch.device) -> int | None:
    """Major compute capability of an NVIDIA GPU, None of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)[0]


def library(major: int, d: int, dv: int) -> Library | str:
    """The first of the libraries here that is for cards of this generation and heads this wide, or why none is."""
    if not any(major in known.cards for known in LIBRARIES):
        return f"no flash-attn is made for cards of compute capability {major}; leave `executor` out"
    here = [known for known in LIBRARIES if major in known.cards and attention_of(known.module) is not None]
    if not here:
        return "no flash-attn for this card is installed; run `pip install 'hfpatch[flash]'`"
    fitting = next((known for known in here if known.fits(major, d, dv)), None)
    names = " and ".join(known.name for known in here)
    return fitting or f"{names} cannot run keys that are {d} wide and values that are {dv} wide on this card"


def _fits_2(major: int, d: int, dv: int) -> bool:
    return d == dv <= 256


def _fits_3(major: int, d: int, dv: int) -> bool:
    return d % 8 == dv % 8 == 0 and ((d, dv) == LATENT or d == dv <= 256)


def _fits_4(major: int, d: int, dv: int) -> bool:
    widest = 256 if major == 9 else 128
    return d % 8 == dv % 8 == 0 and ((d, dv) == LATENT or d == dv <= widest or d == dv == 256)


def _two(attention: Attention, q: Tensor, k: Tensor, v: Tensor, ask: Ask) -> Part:
    out, lse, _ = attention(
        q, k, v, softmax_scale=ask.scale, causal=ask.causal, window_size=_sides(ask), softcap=ask.softcap or 0.0,
        return_attn_probs=True,
    )  # fmt: skip
    return out, lse


def _three(attention: Attention, q: Tensor, k: Tensor, v: Tensor, ask: Ask) -> Part:
    out, lse = attention(
        q, k, v, softmax_scale=ask.scale, causal=ask.causal, window_size=_sides(ask), softcap=ask.softcap or 0.0,
        num_splits=0, return_attn_probs=True,
    )  # fmt: skip  # 0: as many splits of the keys as fill the card
    return out, lse


def _four(attention: Attention, q: Tensor, k: Tensor, v: Tensor, ask: Ask) -> Part:
    left = None if ask.window is None else ask.window - 1
    out, lse = attention(
        q, k, v, softmax_scale=ask.scale, causal=ask.causal, window_size=(left, None), softcap=ask.softcap or 0.0,
        return_lse=True,
    )  # fmt: skip
    return out, lse


def _sides(ask: Ask) -> tuple[int, int]:
    """Keys before and after the query's own that it sees, as 2 and 3 take them; -1: no limit."""
    return (-1, -1) if ask.window is None else (ask.window - 1, 0)


LIBRARIES = (
    Library("flash-attn 3", "flash_attn_interface", frozenset({9}), _fits_3, _three),
    Library("flash-attn 4", "flash_attn.cute", frozenset({9, 10, 11}), _fits_4, _four),
    Library("flash-attn 2", "flash_attn", frozenset(range(8, 13)), _fits_2, _two),
)
