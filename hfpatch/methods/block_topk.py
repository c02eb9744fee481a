"""Block-sparse prefill: each tile of queries attends to the key blocks whose mean key it likes best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config.common import floor, sink_blocks, window_blocks
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, block_means, top_blocks, top_p, within_budget
from ..core.call import AttentionCall
from ..core.logits import logits
from ..core.selection import BlockMap
from ..runtime.model_facts import text_config


@dataclass(kw_only=True)
class BlockTopkConfig(BlockConfig):
    """Settings of `block_topk`."""

    method: ClassVar[str] = "block_topk"
    budget: int | float = option(1024, "keys per query: tokens, or a share of the visible ones", gt=0, share=True)
    floor: int = floor()
    top_p: float | None = option(
        None, "keep blocks up to this share of the estimated attention instead of a budget", gt=0, le=1, old="mass"
    )
    block_k: int = option(64, "keys per block", ge=1)
    sink_blocks: int = sink_blocks(1)
    window_blocks: int = window_blocks(4)
    bands: bool = option(False, "score high and low rotary frequencies apart (Prism)")
    high: float = option(0.5, "share of channels in the high band", gt=0, le=1)
    low: float = option(0.75, "share of channels in the low band", gt=0, le=1)


@register_method
class BlockTopk(BlockSelector[BlockTopkConfig]):
    """Softmax over mean-pooled queries and keys decides; sink, recent and own blocks are always kept.

    The pooled scorer of MoBA-like methods; heads that share a choice average their weights. `bands` is Prism,
    arXiv 2602.08426: mean pooling after RoPE wipes out high frequencies, so both bands are scored apart, each with
    the temperature sqrt(d_z / D) RMS(Q_z) / RMS(Q) RMS(K_z) / RMS(K). With `top_p` the bands' sets are united as in
    the paper; with a budget a block counts with the larger of its two weights. The split assumes rotate-half RoPE;
    channels RoPE leaves alone belong to the low band. Temperatures look at the whole call.
    """

    summary = "top key blocks by pooled scores"
    paper = "https://arxiv.org/abs/2602.08426"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "prism": {"bands": True, "top_p": 0.95, "block_k": 128, "window_blocks": 1, "head_sharing": "head"},
    }

    def __init__(self, config: BlockTopkConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.causality = "no" if config.bands else "tile"  # a band's temperature is that of the whole prompt
        self.rotary_share, self.rotary_tail = 1.0, 0

    def grid(self, call: AttentionCall) -> Grid | None:
        c = self.config
        sees_all = c.top_p is None and isinstance(c.budget, int) and call.Lk <= c.budget
        return None if sees_all else super().grid(call)

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        """Weights of each band, `[bands, B, H, nQ, nK]`."""
        q, k = block_means(call.q, grid.block_q), block_means(call.k, grid.block_k)
        weights = pooled_weights(q, k, grid, self.split(call))
        return torch.stack([self.sharing(w, grid).mean(2) for w in weights])

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        c, best = self.config, scores.amax(0)
        if c.top_p is None:
            budget = grid.budget(c.budget, c.floor)
            forced = grid.forced(c.sink_blocks, c.window_blocks, budget)
            return top_blocks(
                grid, best, forced, budget, grid.most(c.budget, c.floor, c.sink_blocks + c.window_blocks)
            )
        forced = grid.forced(c.sink_blocks, c.window_blocks)
        return within_budget(grid, best, top_p(scores, c.top_p).any(0), forced, None)

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        text = text_config(model)
        rope = getattr(text, "rope_parameters", None) or {}
        self.rotary_share = rope.get("full_attention", rope).get("partial_rotary_factor", 1.0)
        self.rotary_tail = getattr(text, "qk_rope_head_dim", None) or 0

    def split(self, call: AttentionCall) -> list[tuple[Tensor, float]]:
        """Channels of each band with the factor on their scores; one band of all channels without `bands`."""
        c, d, device = self.config, call.q.shape[-1], call.q.device
        if not c.bands:
            return [(torch.arange(d, device=device), call.scale)]
        rotary = self.rotary_tail or int(d * self.rotary_share)
        start, half = d - rotary if self.rotary_tail else 0, rotary // 2
        nh, nl = max(1, round(c.high * half)), max(1, round(c.low * half))
        high, low = torch.arange(nh, device=device), torch.arange(half - nl, half, device=device)
        still = torch.arange(d - rotary, device=device) + (0 if self.rotary_tail else rotary)
        channels = [torch.cat([high, high + half]) + start, torch.cat([low + start, low + start + half, still])]
        unit = call.scale * d**0.5
        return [(band, unit / len(band) ** 0.5) for band in channels]


def pooled_weights(q: Tensor, k: Tensor, grid: Grid, bands: list[tuple[Tensor, float]]) -> list[Tensor]:
    """Per band the softmax `[B, Hq, nQ, nK]` over past blocks of pooled `q [B, Hq, nQ, D]`, `k [B, Hkv, nK, D]`."""
    out = []
    for channels, factor in bands:
        part_q, part_k = q[..., channels], k[..., channels]
        unit = factor / temperature(q, k, part_q, part_k) if len(bands) > 1 else factor
        pooled = logits(unit * part_q, part_k, scale=1.0).masked_fill(~grid.past, -torch.inf)
        out.append(pooled.softmax(-1).masked_fill(~grid.past, 0.0))
    return out


def temperature(q: Tensor, k: Tensor, part_q: Tensor, part_k: Tensor) -> Tensor:
    """Prism's temperature of a band, `[B, Hq, 1, 1]`, from pooled queries and keys and their band's channels."""

    def rms(x: Tensor) -> Tensor:
        return x.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)

    ratio_k = (rms(part_k) / rms(k)).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (part_q.shape[-1] / q.shape[-1]) ** 0.5 * rms(part_q) / rms(q) * ratio_k
