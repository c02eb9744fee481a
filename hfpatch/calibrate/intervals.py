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
    means = bootstrap((after.double() - before.double())[:, None], draws, seed)[:, 0]
    low, high = torch.quantile(means[1:], torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return float(means[0]), low, high


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> Tensor:
    """Means of `values [N, K]`, and of so many draws of N rows: `[1 + draws, K]`."""
    pick = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    return torch.cat([values.mean(0)[None], values[pick].mean(1)])
