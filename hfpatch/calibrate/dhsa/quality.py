"""How a boundary predictor does on the texts kept aside, and whether that is more than a constant would do."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = torch.arange(-30, 31) / 10
BLOCK = 64  # neighbouring positions, which the interval takes or leaves together
FEWEST = 8  # blocks an interval can be made of
LEAST = 0.05
DRAWS = 2000


@dataclass(frozen=True)
class Quality:
    """Exact-position score of the predictor on the texts kept aside, at the logit `threshold` with the best F1.

    `constant` is the best F1 of what does not read the text: all positions of some layers, none of the others. `gain`
    is how far F1 comes from there towards 1, with its 95 % interval (bootstrap over blocks of 64 positions; thresholds
    chosen on every other block and used on the rest).
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    positives: float
    constant: float
    gain: tuple[float, float, float]
    blocks: int

    @property
    def learned(self) -> bool:
        """Whether the whole interval of `gain` lies above 5 %, from 8 blocks or more."""
        return self.blocks >= FEWEST and self.gain[1] > LEAST

    def __str__(self) -> str:
        gain, low, high = self.gain
        return (
            f"F1 {self.f1:.3f} (precision {self.precision:.3f}, recall {self.recall:.3f}) at logit "
            f"{self.threshold:.2f}; {self.positives:.1%} of positions are boundaries; the best constant has F1 "
            f"{self.constant:.3f}, the predictor comes {gain:.1%} of the way from there to 1 (95 % {low:.1%} to "
            f"{high:.1%}, {self.blocks} blocks of text)"
        )


@dataclass
class Counts:
    """Hits, findings and boundaries by block of text, at every threshold of GRID; `add` takes one call at a time."""

    hit: list[Tensor] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    seen: list[dict[int, Tensor]] = field(default_factory=list)

    def text(self, length: int) -> None:
        """Begin another text of so many positions."""
        blocks = -(-length // BLOCK)
        self.hit.append(torch.zeros(blocks, len(GRID), dtype=torch.float64))
        self.found.append(torch.zeros(blocks, len(GRID), dtype=torch.float64))
        self.seen.append({})

    def add(self, layer: int, logits: Tensor, labels: Tensor) -> None:
        """Count a layer's `logits [L]` against its `labels [L]`, of which nan does not count."""
        valid = ~labels.isnan() & logits.isfinite()
        real = valid & (labels > 0.5)
        found = valid & (logits > GRID[:, None])
        self.hit[-1] += _by_block(found & real).T
        self.found[-1] += _by_block(found).T
        both = torch.stack([_by_block(real), _by_block(valid)], -1)
        self.seen[-1][layer] = self.seen[-1].get(layer, torch.zeros(())) + both

    def quality(self) -> Quality:
        """The scores of all that was counted."""
        layers = sorted({layer for text in self.seen for layer in text})
        hit, found = torch.cat(self.hit), torch.cat(self.found)
        seen = torch.cat([torch.stack([text[layer] for layer in layers], 1) for text in self.seen])
        some = seen[..., 1].sum(1) > 0
        hit, found, seen = hit[some], found[some], seen[some]
        hits, finds, real, total = hit.sum(0), found.sum(0), seen[..., 0].sum(), seen[..., 1].sum()
        precision, recall = hits / finds.clamp_min(1), hits / real.clamp_min(1)
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        n = int(f1.argmax())
        positives, constant = real / total.clamp_min(1), best_constant(seen.sum(0))
        scores = (GRID[n], precision[n], recall[n], f1[n], positives, constant, *_gain(hit, found, seen))
        threshold, p, r, f, share, best, *gain = (round(float(t), 4) for t in scores)
        return Quality(threshold, p, r, f, share, best, (gain[0], gain[1], gain[2]), len(hit))


def _by_block(marks: Tensor) -> Tensor:
    """Sums `[..., blocks]` of `marks [..., L]`."""
    return F.pad(marks.double(), (0, -marks.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


def best_constant(seen: Tensor) -> Tensor:
    """Best F1 `[...]` of saying yes to all of some layers, by `seen [..., layers, 2]`: boundaries and positions."""
    real, total = seen[..., 0], seen[..., 1]
    order = (real / total.clamp_min(1)).argsort(-1, descending=True)
    hit, found = real.gather(-1, order).cumsum(-1), total.gather(-1, order).cumsum(-1)
    return (2 * hit / (found + real.sum(-1, keepdim=True)).clamp_min(1)).amax(-1)


def _gain(hit: Tensor, found: Tensor, seen: Tensor) -> tuple[float, float, float]:
    """Share of the way from the best constant's F1 to 1, and its 95 % interval."""
    count = len(hit)
    real, own = seen[..., 0].sum(1), torch.zeros(2, count, dtype=torch.float64)
    for side in range(2):
        there = torch.arange(count) % 2 == side
        f1 = 2 * hit[~there].sum(0) / (found[~there].sum(0) + real[~there].sum()).clamp_min(1)
        best = int(f1.argmax())
        own[0, there], own[1, there] = hit[there, best], found[there, best]
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(DRAWS, count).double())

    def of(weight: Tensor) -> Tensor:
        f1 = 2 * (weight @ own[0]) / (weight @ own[1] + weight @ real).clamp_min(1)
        constant = best_constant((weight @ seen.flatten(1)).unflatten(1, seen.shape[1:]))
        return (f1 - constant) / (1 - constant).clamp_min(1e-12)

    low, high = torch.quantile(of(drawn), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(of(torch.ones(1, count, dtype=torch.float64))), low, high
