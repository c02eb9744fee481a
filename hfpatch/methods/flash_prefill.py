"""FlashPrefill: key blocks whose tile energy comes close to the best block's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.blocks import Grid, block_means, capped, check_budget, choosers, head_sharing, pad_to
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import BlockMap, Causal, Rows, Selection
from ..errors import ConfigError
from ..ops import merge

CHUNK_ELEMENTS = 1 << 20


@dataclass(kw_only=True)
class FlashPrefillConfig(MethodConfig):
    """Settings of `flash_prefill`."""

    method: ClassVar[str] = "flash_prefill"
    alpha: float = option(0.12, "keep blocks with at least this share of the best block's energy", ge=0, le=1)
    budget: int | float | None = option(None, "at most so many keys per tile (tokens or share), best first", gt=0)
    block_q: int = option(128, "queries per tile", ge=1)
    block_k: int = option(128, "keys per block", ge=1)
    sink_blocks: int = option(2, "first key blocks, always kept", ge=0, old="sink")
    window_blocks: int = option(4, "last key blocks up to the tile's own, always kept", ge=1, old="window")
    last_blocks: int = option(2, "query tiles at the end of a prefill call that attend densely", ge=0)
    dense_layers: int = option(0, "first decoder layers that stay dense", ge=0)
    head_sharing: str = head_sharing()
    min_length: int = option(2048, "calls with fewer keys run dense", ge=0)
    mean_correction: bool = option(False, "dropped blocks count with their mean key and mean value")

    def validate(self) -> None:
        if wrong := check_budget("flash_prefill: budget", self.budget):
            raise ConfigError(wrong)


@register_method
class FlashPrefill(Method):
    """Every query meets every mean key; a block stays when its summed exponentials reach alpha times the best.

    FlashPrefill, arXiv 2603.06199 (head_sharing="head") and its second version 2608.19758 ("group": the rows of a tile
    are the queries of all heads of a KV group). The paper's values of alpha: Llama-3.1-8B 0.18, Qwen3-30B-A3B 0.12,
    Qwen2.5-7B 0.08. The second version packs 128 rows of a group to a tile (block_q = 128 / heads per group).
    Its mean correction (`mean_correction`): every dropped block adds its length times exp(logit of its mean key) to
    the softmax, with its mean value; exact where the keys and values of a block are alike. It is left out of calls
    that another method narrows or biases. In chunked prefill the last tiles of each chunk are dense.
    """

    config_class = FlashPrefillConfig
    summary = "key blocks by tile energy and max threshold"
    paper = "https://arxiv.org/abs/2603.06199"
    acts_in = frozenset({"prefill"})
    causality = "tile"

    def __init__(self, config: FlashPrefillConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.settings = config

    def pick(self, layers: list[int]) -> list[int]:
        return [n for n in layers if n >= self.settings.dense_layers]

    def notes(self) -> list[str]:
        return [f"flash_prefill: calls with fewer than {self.settings.min_length} keys run dense (min_length)"]

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        s = self.settings
        tiles = -(-call.Lq // s.block_q) - s.last_blocks
        if call.Lk < s.min_length or tiles <= 0:
            return None
        stop = min(tiles * s.block_q, call.Lq)
        grid = Grid.of(call.layout.rows(0, stop), s.block_q, s.block_k)
        means = block_means(call.k[:, :, : grid.at.Lk], grid.block_k)
        energy = tile_energy(call.q[:, :, :stop], means * call.scale, grid, choosers(call.layout, s.head_sharing))
        keep = (energy > 0) & (energy >= s.alpha * energy.amax(-1, keepdim=True))
        if s.alpha == 0:
            keep = torch.ones_like(keep)
        chosen = capped(grid, energy, keep, grid.forced(s.sink_blocks, s.window_blocks), s.budget)
        return chosen if stop == call.Lq else Rows([(stop, chosen), (call.Lq, Causal())])

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        sel, stop = call.selection, call.Lq
        if isinstance(sel, Rows):
            stop, sel = sel.parts[0]
        if not self.settings.mean_correction or call.lse is None or call.bias is not None:
            return out
        if not isinstance(sel, BlockMap):
            return out
        grid = Grid(call.layout.rows(0, stop), sel.block_q, sel.block_k)
        dropped = grid.past & ~sel.block_mask(grid.at)
        out, call.lse = with_means(call, grid, dropped, out, call.lse)
        return out


def with_means(call: AttentionCall, grid: Grid, dropped: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` with the mean keys and values of `dropped [B|1, H, nQ, nK]` blocks."""
    dropped = dropped.repeat_interleave(call.Hq // dropped.shape[1], 1)
    outs, lses, done = [], [], 0
    keys, values = (
        block_means(x[:, :, : grid.at.Lk], grid.block_k).repeat_interleave(call.groups, 1) for x in (call.k, call.v)
    )
    step = max(1, CHUNK_ELEMENTS // (call.B * call.Hq * grid.block_q * grid.nk))
    for n in range(0, grid.nq, step):
        rows = slice(n * grid.block_q, min((n + step) * grid.block_q, grid.at.Lq))
        seen = int(grid.last[min(n + step, grid.nq) - 1]) // grid.block_k
        if not seen:
            continue
        logits = call.scale * call.q[:, :, rows].float() @ keys[:, :, :seen].mT
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        gone = dropped[:, :, n : n + step, :seen].repeat_interleave(grid.block_q, 2)[:, :, : logits.shape[2]]
        logits = (logits + math.log(grid.block_k)).masked_fill(~gone, -torch.inf)
        mass = logits.logsumexp(-1)
        weights = torch.exp(logits - mass.masked_fill(mass.isneginf(), 0.0)[..., None])
        parts = [(out[:, rows].transpose(1, 2).float(), lse[:, :, rows]), (weights @ values[:, :, :seen], mass)]
        o, merged = merge(parts)
        outs += [out[:, done : rows.start], o.transpose(1, 2).to(out.dtype)]
        lses += [lse[:, :, done : rows.start], merged]
        done = rows.stop
    return torch.cat([*outs, out[:, done:]], 1), torch.cat([*lses, lse[:, :, done:]], 2)


def tile_energy(q: Tensor, means: Tensor, grid: Grid, heads: int) -> Tensor:
    """Sums over a tile's rows of exp(logit - tile maximum), `[B, heads, nQ, nK]`, 0 for blocks no row sees whole.

    `q [B, Hq, Lq, D]`, `means [B, Hkv, nK, D]` scaled mean keys in float32.
    """
    b, hq, lq, _ = q.shape
    out = means.new_zeros(b, heads, grid.nq, grid.nk)
    step = max(1, CHUNK_ELEMENTS // (b * hq * grid.block_q * grid.nk))
    for n in range(0, grid.nq, step):
        start, stop = n * grid.block_q, min((n + step) * grid.block_q, lq)
        seen = (grid.at.off + stop) // grid.block_k
        if not seen:
            continue
        rows = q[:, :, start:stop].float().unflatten(1, (means.shape[1], -1)).flatten(2, 3)
        logits = (rows @ means[:, :, :seen].mT).view(b, hq, stop - start, seen)
        sure = (grid.at.off + start + 1) // grid.block_k
        position = torch.arange(grid.at.off + start, grid.at.off + stop, device=q.device)[:, None]
        logits[..., sure:].masked_fill_((grid.blocks[sure:seen] + 1) * grid.block_k > position + 1, -torch.inf)
        tiles = pad_to(logits, grid.block_q, -2, -torch.inf).unflatten(2, (-1, grid.block_q))
        tiles = tiles.unflatten(1, (heads, -1))
        top = tiles.amax((2, 4, 5), keepdim=True)
        energy = tiles.sub_(top.masked_fill(top.isneginf(), 0.0)).exp_().sum((2, 4))
        out[:, :, n : n + energy.shape[2], :seen] = energy
    return out
