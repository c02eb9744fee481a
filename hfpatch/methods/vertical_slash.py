"""Vertical-slash prefill: the columns and diagonals that the last queries attend to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config.common import floor, most_keys
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, kept_blocks, pad_to, tokens_of, within_budget
from ..core.call import AttentionCall
from ..core.learned import Learned, ModelSizes
from ..core.logits import biased, capped
from ..core.selection import BlockMap
from ..errors import ConfigError
from ..files.json_text import read_json
from ..values import INT_END, Misfit, OutOfRange, PathText, fitted, shown

CHUNK_ELEMENTS = 1 << 24


@dataclass(kw_only=True)
class VerticalSlashConfig(BlockConfig):
    """Settings of `vertical_slash`; lines in tokens or as a share of the prompt."""

    method: ClassVar[str] = "vertical_slash"
    vertical: int | float = option(0.1, "columns kept, the first ones included", gt=0, share=True)
    slash: int | float = option(0.2, "diagonals kept, the nearest ones included", gt=0, share=True)
    budget: int | float | None = most_keys()
    floor: int = floor()
    head_config: PathText | None = option(None, "JSON file with (vertical, slash) tokens per layer and query head")
    estimate: int = option(64, "last queries whose attention is looked at", ge=1)
    sink: int = option(30, "first columns, always kept", ge=0)
    local: int = option(100, "nearest diagonals, always kept", ge=1)
    block_q: int = option(64, "queries per tile", ge=1)
    block_k: int = option(64, "neighbouring columns and diagonals chosen together; 1 chooses single ones", ge=1)


@register_method
class VerticalSlash(BlockSelector[VerticalSlashConfig]):
    """Attention of a few queries, summed down columns and along diagonals, says which of both to keep.

    MInference, arXiv 2407.02490; its published per-head budgets load with `head_config`, its fallback is the preset
    "minference". A tile attends to every key block that a kept line crosses, as in the paper's kernel; block_k = 1
    and block_q = 1 give the formula token by token. Larger blocks choose bands of block_k columns or diagonals by
    their sums, where the paper chooses single ones and its kernel rounds the diagonals up. Heads that share a
    choice add their attention up and take the largest budget among them. A band of diagonals crosses two blocks of a
    tile: about vertical + 2 slash of the keys are seen. `budget` is what this library adds: of the blocks that a tile
    would see, those whose column and diagonals got the most attention.
    """

    summary = "columns and diagonals seen by the last queries"
    paper = "https://arxiv.org/abs/2407.02490"
    reads = "positions"
    causality = "no"  # the last queries choose for all
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "minference": {"vertical": 1000, "slash": 6096, "head_sharing": "head"},
    }

    def __init__(self, config: VerticalSlashConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        if not self.given and config.head_config is not None:
            self.given = {"per_head": read_head_config(config.head_config)}
        self.per_head = self.given.get("per_head")

    def learns(self, sizes: ModelSizes) -> dict[str, Learned]:
        return {"per_head": Learned((sizes.layers, sizes.heads, 2), whole=True, ge=0, le=INT_END)}

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        """Attention to a block's column and to the diagonals it meets, 0 where no kept line crosses tile and block."""
        c, size = self.config, grid.block_k
        columns, diagonals = (  # [B, H, nK]: bands of block_k lines
            pad_to(self.sharing(line, grid).sum(2), size, -1).unflatten(-1, (-1, size)).sum(-1)
            for line in line_sums(call, min(c.estimate, call.Lq))
        )
        vertical, slash = self.budgets(call, columns.shape[1])
        kept_columns = best_lines(columns, -(-vertical // size), -(-c.sink // size))
        kept_diagonals = best_lines(diagonals, -(-slash // size), -(-c.local // size))
        kept = kept_columns[:, :, None] | crossed(kept_diagonals, grid)
        if c.budget is None:
            return kept
        return (columns[:, :, None] + diagonal_means(diagonals, grid)).clamp_min(1e-30) * kept

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        c, size = self.config, grid.block_k
        if c.budget is None:
            return kept_blocks(grid, scores)
        budget = grid.budget(c.budget, c.floor)
        forced = grid.forced(-(-c.sink // size), -(-(c.local + grid.block_q) // size), budget)
        return within_budget(grid, scores, scores > 0, forced, budget)

    def budgets(self, call: AttentionCall, heads: int) -> tuple[Tensor, Tensor]:
        """Columns and diagonals per chooser, `[heads, 1]`, in tokens."""
        if self.per_head is not None:
            own = self.per_head[call.layer].to(call.q.device).unflatten(0, (heads, -1)).amax(1)
            return own[:, :1], own[:, 1:]
        both = (tokens_of(x, call.Lk) for x in (self.config.vertical, self.config.slash))
        vertical, slash = (torch.full((heads, 1), n, device=call.q.device) for n in both)
        return vertical, slash


def line_sums(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    """Attention weights of the `last` queries summed per column and per diagonal i - j, both `[B, Hq, Lk]`."""
    step = max(1, CHUNK_ELEMENTS // (call.B * call.groups * call.Lk))
    columns, diagonals = (call.q.new_zeros(call.B, call.Hq, call.Lk, dtype=torch.float32) for _ in range(2))
    for h in range(call.Hkv):
        heads = slice(h * call.groups, (h + 1) * call.groups)
        keys = call.k[:, h : h + 1].flip(2).float().mT
        for start in range(call.Lq - last, call.Lq, step):
            stop = min(start + step, call.Lq)
            weights = _weights_from_last(call, heads, keys, start, stop)
            columns[:, heads, : call.off + stop] += weights.sum(2).flip(-1)
            diagonals[:, heads, : call.off + stop] += diagonal_sums(weights)
    return columns, diagonals


def _weights_from_last(call: AttentionCall, heads: slice, keys: Tensor, start: int, stop: int) -> Tensor:
    """Softmax weights `[B, G, R, n]` of queries `start..stop`, keys from the last they see to the first.

    `keys [B, 1, D, Lk]` from last to first, in float32.
    """
    rows = stop - start
    logits = capped(call.q[:, heads, start:stop].float() * call.scale @ keys[..., call.Lq - stop :], call.softcap)
    if call.bias is not None:
        bias = call.bias[..., : call.off + stop].flip(-1)
        logits = biased(logits, bias[:, heads] if bias.shape[1] > 1 else bias)
    future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu(1).flip(-1)
    logits[..., :rows].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def diagonal_sums(weights: Tensor) -> Tensor:
    """Sums `[B, G, Lk]` over i - j of `weights [B, G, R, Lk]` whose columns run from the last key to the first.

    Row r begins R - 1 - r entries early in a view with rows of Lk - 1; what it reads past its end are weights of
    the next row's future keys, which are 0.
    """
    rows, n = weights.shape[2:]
    strides = (*weights.stride()[:2], n - 1, 1)
    skewed = weights.as_strided((*weights.shape[:3], n - 1), strides, weights.storage_offset() + rows - 1)
    return torch.cat([skewed.sum(2), weights[:, :, -1, -1:]], -1)


def best_lines(score: Tensor, budget: Tensor, forced: int) -> Tensor:
    """Bool like `score [B, H, n]`: the first `forced` ones and the best, `budget [H, 1]` in all."""
    first = torch.arange(score.shape[-1], device=score.device) < forced
    rank = score.masked_fill(first, torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < budget) | first


def met(grid: Grid) -> tuple[Tensor, Tensor]:
    """First band of block_k diagonals that meets tile and block, and the one past the last, both `[nQ, nK]`."""
    start = grid.blocks * grid.block_k
    stop = (start + grid.block_k).clamp(max=grid.at.Lk) - 1
    high = ((grid.last[:, None] - start) // grid.block_k + 1).clamp(min=0)
    return ((grid.first[:, None] - stop) // grid.block_k).clamp(min=0).minimum(high), high


def crossed(bands: Tensor, grid: Grid) -> Tensor:
    """Bool `[B, H, nQ, nK]`: a diagonal of the kept `bands [B, H, nK]` of width block_k crosses tile and block."""
    low, high = met(grid)
    before = pad(bands.int().cumsum(-1), [1, 0])  # [B, H, nK + 1]
    return before[..., high] > before[..., low]


def diagonal_means(bands: Tensor, grid: Grid) -> Tensor:
    """Mean `[B, H, nQ, nK]` of `bands [B, H, nK]` over those that meet tile and block."""
    low, high = met(grid)
    before = pad(bands.to(torch.float32 if bands.device.type == "mps" else torch.float64).cumsum(-1), [1, 0])
    return ((before[..., high] - before[..., low]) / (high - low).clamp(min=1)).float()


def read_head_config(path: str) -> Tensor:
    """Budgets `[layers, Hq, 2]` of a JSON list over layers of {head: [kind, vertical, slash, ...]}."""
    where = f"vertical_slash: head_config={shown(path)}"
    try:
        rows = [[layer[str(h)] for h in range(len(layer))] for layer in read_json(Path(path))]
        kinds = {row[0] for layer in rows for row in layer}
        budgets = [[fitted(row[1:3], list[int]) for row in layer] for layer in rows]
        per_head = torch.tensor(budgets, dtype=torch.long)
    except (ConfigError, OutOfRange, ValueError, LookupError, TypeError) as e:
        raise ConfigError(f"{where} cannot be read ({type(e).__name__}: {e}).") from e
    except Misfit as e:
        raise ConfigError(f"{where} cannot be read (budgets are whole numbers).") from e
    if kinds - {"vertical_and_slash"}:
        raise ConfigError(f"{where} asks for {sorted(map(shown, kinds))}; only vertical_and_slash is known.")
    if per_head.ndim != 3 or per_head.shape[2] != 2 or bool((per_head < 0).any()):
        raise ConfigError(f"{where} cannot be read (every head of every layer needs its kind and two budgets).")
    return per_head
