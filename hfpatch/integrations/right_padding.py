"""Telling right padding from tokens in batches that come without a mask."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD = 0


class RightPadding:
    """Knows the token rows of a run and finds them again in padded batches.

    A row that ends in zeros is compared with the known rows; one that is not known counts as unpadded. Where one known
    row is another one followed by real zeros the longer is taken, which changes nothing for causal attention.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        self._known: dict[int, set[int]] = {}
        for row in rows:
            self._known.setdefault(len(row), set()).add(hash(tuple(row)))

    def lengths(self, ids: Tensor) -> list[int]:
        """Real tokens per row of `ids [B, L]`."""
        return [self._length(row) for row in ids.tolist()]

    def mask(self, ids: Tensor) -> Tensor | None:
        """Attention mask `[B, L]` of ones and zeros for `ids [B, L]`, None when no row is padded."""
        lengths = self.lengths(ids)
        if min(lengths) == ids.shape[1]:
            return None
        stop = torch.tensor(lengths, device=ids.device)
        return (torch.arange(ids.shape[1], device=ids.device) < stop[:, None]).long()

    def _length(self, row: list[int]) -> int:
        zeros = next((n for n, token in enumerate(reversed(row)) if token != PAD), len(row))
        if zeros:
            shortest = len(row) - zeros
            for length in sorted((n for n in self._known if shortest <= n <= len(row)), reverse=True):
                if hash(tuple(row[:length])) in self._known[length]:
                    return length
        return len(row)
