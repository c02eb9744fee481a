"""XAttention: antidiagonal sums of logits stand for whole blocks."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.common import floor, most_keys, sink_blocks, window_blocks
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, pad_to, top_p, within_budget
from ..core.call import AttentionCall
from ..core.logits import logits
from ..core.selection import BlockMap, no_longer
from ..errors import ConfigError

CHUNK_ELEMENTS = 1 << 20


@dataclass(kw_only=True)
class XAttentionConfig(BlockConfig):
    """Settings of `xattention`; `block_q` and `block_k` are multiples of `stride`."""

    method: ClassVar[str] = "xattention"
    top_p: float = option(
        0.95, "keep the fewest blocks with this share of the estimated attention", gt=0, le=1, old="mass"
    )
    budget: int | float | None = most_keys()
    floor: int = floor()
    stride: int = option(16, "tokens per cell side; one in `stride` products is computed", ge=1)
    sink_blocks: int = sink_blocks(1)
    window_blocks: int = window_blocks(1)

    def validate(self) -> None:
        if self.block_q % self.stride or self.block_k % self.stride:
            raise ConfigError(
                f"xattention: stride={self.stride} must divide block_q={self.block_q} and block_k={self.block_k}."
            )


@register_method
class XAttention(BlockSelector[XAttentionConfig]):
    """Softmax over cells of stride x stride tokens, each standing with the sum of its antidiagonal; top-p.

    XAttention, arXiv 2503.16428. The logit of a cell is divided by the stride and by sqrt(D) as in the paper's code,
    not by sqrt(D stride) as printed; the model's own scale takes the place of 1 / sqrt(D). Cells at the end of a
    call sum the products they have. The paper chooses per query head (head_sharing="head") and with thresholds per
    head for Llama, of 0.9 at most; heads that share a choice add their scores up. 0.95 halves what answers lose on a
    small model (docs/results-real.md).
    """

    summary = "key blocks by antidiagonal sums and top-p"
    paper = "https://arxiv.org/abs/2503.16428"

    def grid(self, call: AttentionCall) -> Grid:
        c, stride = self.config, self._stride(call)
        sides = (no_longer(size, length) for size, length in ((c.block_q, call.Lq), (c.block_k, call.Lk)))
        return Grid(call.layout, *(-(-side // stride) * stride for side in sides))

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        return self.sharing(block_scores(call, grid, self._stride(call)), grid).sum(2)

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        c = self.config
        budget = None if c.budget is None else grid.budget(c.budget, c.floor)
        forced = grid.forced(c.sink_blocks, c.window_blocks, budget)
        return within_budget(grid, scores, top_p(scores, c.top_p), forced, budget)

    def _stride(self, call: AttentionCall) -> int:
        return no_longer(self.config.stride, call.Lk)


def block_scores(call: AttentionCall, grid: Grid, stride: int) -> Tensor:
    """Cell weights summed over every query tile and key block, `[B, Hq, nQ, nK]` in float32."""
    b, hq = call.B, call.Hq
    # tokens of a cell side by side, keys from its last to its first: [B, Hkv, cells, stride D]
    k = pad_to(call.k.float(), stride, -2).unflatten(2, (-1, stride)).flip(3).flatten(3)
    out = k.new_zeros(b, hq, grid.nq, grid.nk)
    high, wide = grid.block_q // stride, grid.block_k // stride  # cells of a tile, of a block
    step = max(1, CHUNK_ELEMENTS // (b * hq * high * k.shape[2]))
    for n in range(0, grid.nq, step):
        start, stop = n * grid.block_q, min((n + step) * grid.block_q, call.Lq)
        q = pad_to(call.q[:, :, start:stop].float(), stride, -2).unflatten(2, (-1, stride)).flatten(3)
        first = call.off + start + stride * torch.arange(q.shape[2], device=q.device)
        last = (first + stride).clamp(max=call.Lk) - 1
        seen = -(-(call.off + stop) // stride)
        cells = logits(q, k[:, :, :seen], scale=call.scale / stride)  # [B, Hq, rows of cells, seen]
        sure = (call.off + start) // stride
        begin = torch.arange(sure, seen, device=q.device) * stride
        cells[..., sure:].masked_fill_(begin > last[:, None], -torch.inf)
        weights = pad_to(pad_to(cells.softmax(-1), high, -2), wide, -1)
        part = weights.unflatten(3, (-1, wide)).sum(4).unflatten(2, (-1, high)).sum(3)  # [B, Hq, tiles, blocks]
        out[:, :, n : n + part.shape[2], : part.shape[3]] = part
    return out
