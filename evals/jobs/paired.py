"""A measure beside dense's of the same samples: the mean difference with its interval, in rows and in words."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..run.cells import Cell, Data
from ..run.stats import mean_interval
from ..run.variants import DENSE
from .base import FIGURE
from .view import Row

BOUND = {"anyOf": [{"type": "null"}, FIGURE]}
INTERVAL = "with its 95 % interval (Student's t) where there are several"


@dataclass(frozen=True)
class Pairs:
    """A measure whose cells keep a number per sample in `values`; rows get `names`: the mean difference and its ends.

    Older results have no such numbers, nor has what was not measured: their rows get nothing.
    """

    values: str
    names: tuple[str, str, str]

    @property
    def schema(self) -> dict[str, Any]:
        """Properties that a row may have."""
        return {name: BOUND for name in self.names}

    def apart(self, cell: Cell, done: Mapping[Cell, Data]) -> Data:
        """The keys of a cell's rows."""
        own, dense = (found.get(self.values) for found in (done[cell], done.get(replace(cell, variant=DENSE), {})))
        if own is None or dense is None or len(own) != len(dense):
            return {}
        differences = [a - b for a, b in zip(own, dense, strict=True)]
        return dict(zip(self.names, mean_interval(differences), strict=True))

    def words(self, row: Row) -> tuple[str, bool]:
        """What stands small beside a row's value, and whether the two are apart; dense stands alone."""
        apart, low, high = (row.get(name) for name in self.names)
        if apart is None or row["variant"] == DENSE:
            return "", True
        if low is None or high is None:
            return f"{apart:+.3f}", True
        return f"{apart:+.3f} ± {(high - low) / 2:.3f}", not low <= 0 <= high
