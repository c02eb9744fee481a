"""Methods that choose key blocks for tiles of queries: what is left to them are scores, and how to choose by these."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..config.common import head_sharing, min_length, question_tokens
from ..config.method_config import MethodConfig, option
from .blocks import Grid, choosers, kept_blocks
from .call import AttentionCall
from .method import Method
from .selection import BlockMap, Causal, Rows, Selection


@dataclass(kw_only=True)
class BlockConfig(MethodConfig):
    """Settings of every method that chooses key blocks."""

    block_q: int = option(128, "queries per tile", ge=1)
    block_k: int = option(128, "keys per block", ge=1)
    head_sharing: str = head_sharing()
    question_tokens: int = question_tokens()
    min_length: int = min_length()


B = TypeVar("B", bound=BlockConfig)


class BlockSelector(Method[B]):
    """`scores` tells how much each tile wants each block; `choose`, which it gets: those above 0 unless overridden.

    `grid` lays out tiles and blocks. Queries after its last tile run dense, and so does the call where it gives None.
    """

    acts_in = frozenset({"prefill"})
    causality = "tile"

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        asking = call.asking(self.config.question_tokens)
        if self.too_short(call) or asking >= call.Lq:
            return None
        part = call.first(call.Lq - asking) if asking else call
        grid = self.grid(part)
        if grid is None:
            return None
        chosen, stop = self.choose(grid, self.scores(part, grid)), grid.at.Lq
        return chosen if stop == call.Lq else Rows([(stop, chosen), (call.Lq, Causal())])

    def grid(self, call: AttentionCall) -> Grid | None:
        """Tiles and blocks of the call, or of its first queries."""
        return Grid.of(call.layout, self.config.block_q, self.config.block_k)

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        """Scores `[B, H, nQ, nK]`, one for the heads that share a choice."""
        raise TypeError(f"{type(self).__name__} does not define scores()")

    def choose(self, grid: Grid, scores: Tensor) -> BlockMap:
        """The blocks each tile attends to, by its `scores [B, H, nQ, nK]`."""
        return kept_blocks(grid, scores > 0)

    def sharing(self, x: Tensor, grid: Grid) -> Tensor:
        """`x [B, Hq, ...]` as `[B, H, Hq / H, ...]`: side by side the heads that share a choice."""
        return x.unflatten(1, (choosers(grid.at, self.config.head_sharing), -1))
