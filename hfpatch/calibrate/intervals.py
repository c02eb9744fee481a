"""Confidence intervals of shares and of differences between paired shares."""

import math

import torch
from torch import Tensor

Z95 = 1.959964


def wilson(hits: Tensor) -> tuple[float, float]:
    """95 % interval of the share of True in `hits [N]` (Wilson score)."""
    return wilson_of(float(hits.float().mean()), len(hits))


def wilson_of(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share `p` in [0, 1] of `n` (Wilson score)."""
    centre = p + Z95**2 / (2 * n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return (centre - half) / (1 + Z95**2 / n), (centre + half) / (1 + Z95**2 / n)


def paired(after: Tensor, before: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference of two paired `[N]` and its 95 % percentile-bootstrap interval."""
    difference = after.double() - before.double()
    pick = torch.randint(len(difference), (draws, len(difference)), generator=torch.Generator().manual_seed(seed))
    means = difference[pick].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(difference.mean()), low, high
