"""Boundaries of a call's keys, by the rule that the settings name."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.call import AttentionCall
from .boundaries import Cutting, cut, fixed, novelty, snap, split_long
from .config import DhsaConfig
from .labels import mass_ratio
from .predictor import BoundaryPredictor
from .trust import suppressor


@dataclass(frozen=True)
class Finder:
    """Says where chunks begin; `predictor` is there if the settings ask for one."""

    config: DhsaConfig
    predictor: BoundaryPredictor | None

    def find(self, call: AttentionCall, start: int, stop: int, forced: int | None) -> Tensor:
        """Boundary flags `[B, stop - start]` of the tokens `start .. stop`; `forced` is one of them in any case."""
        c = self.config
        if c.boundaries == "fixed":
            flags = fixed(call.B, start, stop, c.chunk, call.k.device)
        else:
            score = self.score(call, start, stop)
            if c.threshold is not None:
                score = score.masked_fill(score <= c.threshold, -torch.inf)
            flags = cut(score, Cutting(c.radius, c.chunk), forced, suppressor(score, c.executor))
        if start < c.sink < stop:  # initial tokens' keys are unlike others and would speak for their chunk
            flags = flags.clone()
            flags[:, c.sink - start] = True
        if c.longest:
            flags = split_long(flags, c.longest)
        return snap(flags, start, c.align) if c.align > 1 else flags

    def most(self, tokens: int) -> int:
        """What the boundaries found among so many tokens do not exceed in number."""
        c = self.config
        return tokens // c.chunk + (tokens // c.longest if c.longest else 0) + 4

    def score(self, call: AttentionCall, start: int, stop: int) -> Tensor:
        """Boundary scores `[B, stop - start]`; -inf where there are too few tokens on a side."""
        c = self.config
        if c.boundaries == "oracle":
            return mass_ratio(call, c.boundary_window)[:, start:stop].float().nan_to_num(-torch.inf)
        if c.boundaries == "predictor" and self.predictor is not None:
            lead = min(start, self.predictor.window)
            return self.predictor.score(call.k[:, :, start - lead : stop])[:, lead:]
        lead = min(start, c.boundary_window)
        return novelty(call.k[:, :, start - lead : stop], c.boundary_window)[:, lead:]
