"""XAttention: antidiagonal sums of logits stand for whole blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.blocks import Grid, capped, check_budget, choosers, head_sharing, no_longer, pad_to, top_mass
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import Selection
from ..errors import ConfigError

CHUNK_ELEMENTS = 1 << 20


@dataclass(kw_only=True)
class XAttentionConfig(MethodConfig):
    """Settings of `xattention`."""

    method: ClassVar[str] = "xattention"
    top_p: float = option(
        0.9, "keep the fewest blocks with this share of the estimated attention", gt=0, le=1, old="mass"
    )
    budget: int | float | None = option(None, "at most so many keys per tile (tokens or share), best first", gt=0)
    stride: int = option(16, "tokens per cell side; one in `stride` products is computed", ge=1)
    block_q: int = option(128, "queries per tile, a multiple of stride", ge=1)
    block_k: int = option(128, "keys per block, a multiple of stride", ge=1)
    sink_blocks: int = option(1, "first key blocks, always kept", ge=0, old="sink")
    window_blocks: int = option(1, "last key blocks up to the tile's own, always kept", ge=1, old="window")
    head_sharing: str = head_sharing()
    min_length: int = option(2048, "calls with fewer keys run dense", ge=0)

    def validate(self) -> None:
        if self.block_q % self.stride or self.block_k % self.stride:
            raise ConfigError(
                f"xattention: stride={self.stride} must divide block_q={self.block_q} and block_k={self.block_k}."
            )
        if wrong := check_budget("xattention: budget", self.budget):
            raise ConfigError(wrong)


@register_method
class XAttention(Method):
    """Softmax over cells of stride x stride tokens, each standing with the sum of its antidiagonal; top-p.

    XAttention, arXiv 2503.16428. The logit of a cell is divided by the stride and by sqrt(D) as in the paper's code,
    not by sqrt(D stride) as printed; the model's own scale takes the place of 1 / sqrt(D). Cells at the end of a
    call sum the products they have. The paper chooses per query head (head_sharing="head") and with thresholds per
    head for Llama; heads that share a choice add their scores up.
    """

    config_class = XAttentionConfig
    summary = "key blocks by antidiagonal sums and top-p"
    paper = "https://arxiv.org/abs/2503.16428"
    acts_in = frozenset({"prefill"})
    causality = "tile"

    def __init__(self, config: XAttentionConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.settings = config

    def notes(self) -> list[str]:
        return [f"xattention: calls with fewer than {self.settings.min_length} keys run dense (min_length)"]

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        s = self.settings
        if call.Lk < s.min_length:
            return None
        stride = no_longer(s.stride, call.Lk)
        sides = (-(-no_longer(size, n) // stride) * stride for size, n in ((s.block_q, call.Lq), (s.block_k, call.Lk)))
        grid = Grid(call.layout, *sides)
        score = block_scores(call, grid, stride)
        score = score.unflatten(1, (choosers(call.layout, s.head_sharing), -1)).sum(2)
        return capped(grid, score, top_mass(score, s.top_p), grid.forced(s.sink_blocks, s.window_blocks), s.budget)


def block_scores(call: AttentionCall, grid: Grid, stride: int) -> Tensor:
    """Cell weights summed over every query tile and key block, `[B, Hq, nQ, nK]` in float32."""
    b, hq, hkv = call.B, call.Hq, call.Hkv
    k = pad_to(call.k.float(), stride, -2).unflatten(2, (-1, stride)).flip(3).flatten(3)
    out = k.new_zeros(b, hq, grid.nq, grid.nk)
    side = grid.block_q // stride
    step = max(1, CHUNK_ELEMENTS // (b * hq * side * k.shape[2]))
    for n in range(0, grid.nq, step):
        start, stop = n * grid.block_q, min((n + step) * grid.block_q, call.Lq)
        q = pad_to(call.q[:, :, start:stop].float(), stride, -2).unflatten(2, (-1, stride)).flatten(3)
        first = call.off + start + stride * torch.arange(q.shape[2], device=q.device)
        last = (first + stride).clamp(max=call.Lk) - 1
        seen = -(-(call.off + stop) // stride)
        rows = q.unflatten(1, (hkv, -1)).flatten(2, 3) * (call.scale / stride)
        logits = (rows @ k[:, :, :seen].mT).view(b, hq, -1, seen)
        sure = (call.off + start) // stride
        cells = torch.arange(sure, seen, device=q.device)
        logits[..., sure:].masked_fill_(cells * stride > last[:, None], -torch.inf)
        weights = pad_to(pad_to(logits.softmax(-1), side, -2), grid.block_k // stride, -1)
        part = weights.unflatten(3, (-1, grid.block_k // stride)).sum(4).unflatten(2, (-1, side)).sum(3)
        out[:, :, n : n + part.shape[2], : part.shape[3]] = part
    return out
