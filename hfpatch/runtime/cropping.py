"""Caches that drop the keys no one will look at again: before a call, when it begins, and after it."""

from collections.abc import Sequence
from typing import Any

from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import SinkWindow
from ..errors import CacheError
from .cache_crop import check_croppable, crop_layer, open_layer
from .raw_call import RawCall
from .row_slice import RowSlice

_START = "hfpatch-start"


class Cropping:
    """What the methods of a layer that `retain` few keys do to its cache."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.retain = [m.retain for m in methods if m.retain is not None]

    def before(self, cache: Any, layer_idx: int | None) -> None:
        """Announce a call to a cropped layer, which serves no others."""
        if self.retain:
            open_layer(cache, layer_idx)

    def check(self, raw: RawCall, call: AttentionCall, tokens: RowSlice) -> None:
        """Raise CacheError when these rows want keys that the cache has dropped."""
        if raw.kept is None:
            return
        same_start = call.state.get(_START, [tokens.start]) == [tokens.start] * call.B
        if any(retain(call) != raw.kept for retain in self.retain) or tokens.stop < raw.total or not same_start:
            raise CacheError(
                "This cache has been cropped for another route or another padding; keep both, or process the prompt "
                "anew."
            )

    def after(self, raw: RawCall, calls: Sequence[tuple[AttentionCall, RowSlice]]) -> None:
        """Let the cache drop what no row will look at again. Raises CacheError where it cannot."""
        if not self.retain or raw.cache is None or raw.kept:
            return
        check_croppable(raw.cache, raw.slot, getattr(raw.module, "layer_idx", None))
        keep = self._agreed(calls)
        if keep is None or raw.total != raw.k.shape[2]:
            return
        starts = [0] * raw.q.shape[0]
        for call, tokens in calls:
            if tokens.stop < raw.total or call.Lk < keep.sink + keep.window:
                return
            for row in tokens.rows:
                starts[row] = tokens.start
        for call, _ in calls:
            call.state[_START] = [starts[r] for r in call.rows]
        crop_layer(raw.cache, raw.slot, keep, starts)

    def _agreed(self, calls: Sequence[tuple[AttentionCall, RowSlice]]) -> SinkWindow | None:
        """The keys that all methods retain for all rows, if they agree."""
        wanted = [retain(call) for call, _ in calls for retain in self.retain]
        return wanted[0] if wanted and all(other == wanted[0] for other in wanted) else None
