"""When the cache may drop keys for methods that retain few, and whether it still holds what a call wants."""

from collections.abc import Sequence

from ..core.call import AttentionCall
from ..core.method import Method
from ..errors import CacheError
from .cache_crop import check_croppable, crop_layer
from .chain import Plan
from .padding import RowGroup
from .raw_call import RawCall

_START = "hfpatch-start"


def check_kept(methods: Sequence[Method], raw: RawCall, call: AttentionCall, group: RowGroup) -> None:
    """Raise CacheError when these rows want keys the cache has dropped."""
    same_start = call.state.get(_START, [group.start]) == [group.start] * call.B
    if any(m.retain(call) != raw.kept for m in methods) or group.stop < raw.total or not same_start:
        raise CacheError(
            "This cache has been cropped for another route or another padding; keep both, or process the prompt anew."
        )


def crop(methods: Sequence[Method], raw: RawCall, plans: Sequence[Plan]) -> None:
    """Let the cache drop what no row will look at again. Raises CacheError where it cannot."""
    if raw.cache is None:
        return
    check_croppable(raw.cache, raw.slot, getattr(raw.module, "layer_idx", None))
    wanted = [(p.whole, m.retain(p.whole)) for p in plans for m in methods]
    keep = wanted[0][1] if wanted else None
    starts = [0] * raw.q.shape[0]
    for p in plans:
        if p.group.stop < raw.total or keep is None or p.whole.Lk < keep.sink + keep.window:
            return
        for row in p.group.rows:
            starts[row] = p.group.start
    if keep is None or any(other != keep for _, other in wanted) or raw.total != raw.k.shape[2]:
        return
    for whole, _ in wanted:
        whole.state[_START] = [starts[r] for r in whole.rows]
    crop_layer(raw.cache, raw.slot, keep, starts)
