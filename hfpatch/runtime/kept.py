"""What a cache layer has left after keys were dropped: in which slots the tokens of each row lie now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.call import rows_on
from ..core.selection import SinkWindow
from ..errors import CacheError
from .row_slice import RowSlice


@dataclass(frozen=True, eq=False)
class Kept:
    """The state of a layer right after the last drop, when it had seen `seen` tokens and held `slots` keys.

    Tokens seen since lie in the slots that follow. Row `n` begins at token `starts[n]` of all (None: it has none yet)
    and leaves its first `empty[n]` slots empty. `places [B, Hc, slots]` are the tokens of each row that were kept, -1
    in empty slots; None under a `rule` that goes on dropping. The last `tail` tokens can still be taken back.
    """

    method: str
    rule: SinkWindow | None
    seen: int
    slots: int
    starts: Sequence[int | None]
    empty: Sequence[int]
    places: Tensor | None = None
    tail: int = 0

    def slots_of(self, tokens: RowSlice, total: int, keys: int) -> RowSlice:
        """The slots of `tokens`, real ones of `total`, among all `keys`. Raises CacheError for another padding."""
        if tokens.length == 0:
            return RowSlice(tokens.rows, 0, 0)
        ends = total if self.rule else self.seen
        first = {self._first(row, tokens.start) for row in tokens.rows}
        if len(first) != 1 or None in first or tokens.stop < ends:
            raise CacheError(
                "This cache has been cropped for another padding; pass the attention_mask of its tokens with ones for "
                "the new ones, or process the prompt anew."
            )
        (start,) = first
        assert start is not None
        return RowSlice(tokens.rows, start, keys - (total - tokens.stop))

    def _first(self, row: int, start: int) -> int | None:
        """The first slot of a row that begins at token `start`; None where it did not begin there before."""
        known = self.starts[row]
        if known is None:
            return self.slots + start - self.seen if start >= self.seen else None
        return self.empty[row] if start == known else None

    def dropped(self, row: int) -> int:
        """Tokens of a row that are gone; only a rule, which goes on dropping, cannot tell."""
        start = self.starts[row]
        return 0 if start is None else (self.seen - start) - (self.slots - self.empty[row])

    def taken(self, source: Sequence[int]) -> "Kept":
        """The rows `source` of these, as beam search has it."""
        places = None if self.places is None else self.places[rows_on(self.places.device, tuple(source))]
        starts, empty = [self.starts[n] for n in source], [self.empty[n] for n in source]
        return replace(self, starts=starts, empty=empty, places=places)

    def shortened(self, seen: int) -> "Kept":
        """Without the kept tokens from `seen` on."""
        back = self.seen - seen
        if back <= 0:
            return self
        slots = self.slots - back
        starts = [None if start is None or start >= seen else start for start in self.starts]
        empty = [min(n, slots) for n in self.empty]
        places = None if self.places is None else self.places[..., :slots]
        return replace(self, seen=seen, slots=slots, starts=starts, empty=empty, places=places, tail=self.tail - back)

    def all_places(self, starts: Sequence[int | None], keys: int) -> Tensor | None:
        """Tokens `[B, Hc, keys]` of rows that begin at `starts` in all slots, those appended since among them."""
        if self.places is None:
            return None
        new = counted(starts, self.seen, keys - self.slots, self.places)
        return torch.cat([self.places, new.expand(*self.places.shape[:2], -1)], -1)


def counted(starts: Sequence[int | None], first: int, count: int, like: Tensor) -> Tensor:
    """Places `[B, 1, count]` of the tokens from `first` on in rows that begin at `starts`; -1 before that."""
    begin = torch.tensor([first if n is None else n for n in starts], dtype=torch.int32, device=like.device)
    tokens = torch.arange(first, first + count, dtype=torch.int32, device=like.device)
    return (tokens - begin[:, None]).clamp(min=-1)[:, None]
