"""Cache layers that keep a sink and a window of keys, for methods that will never look at the others again.

Positions go on counting every token seen, so the model's masks and rotations stay those of the whole cache.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..core.selection import SinkWindow
from ..errors import CacheError
from .cache_state import cache_layer, check_keys, following, mark_keys

_OPEN = "hfpatch_open"
_Base: Any = following(DynamicLayer)


class CroppedLayer(_Base):
    """A DynamicLayer cut to `hfpatch_kept`; it serves only calls that `open_layer` has announced."""

    is_croppable = False
    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Kept and new keys and values `[B, Hkv, kept + new, D]`, of which it then keeps the sink and the window."""
        if not self.__dict__.pop(_OPEN, False):
            raise CacheError(
                "This cache has been cropped to the keys of a sparse route, and the model no longer takes that route; "
                "patch it with the same settings again, or process the prompt anew."
            )
        check_keys(self)
        if self.__dict__.pop("hfpatch_lost", False):
            raise CacheError("The keys of a cropped cache have been changed by hand; process the prompt anew.")
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.hfpatch_seen += key_states.shape[-2]
        self.keys, self.values = _cut(keys, self.hfpatch_kept), _cut(values, self.hfpatch_kept)
        mark_keys(self)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return int(self.hfpatch_seen)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys for the model's mask: the whole cache's. Old releases give positions."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return int(self.hfpatch_seen) + new, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises CacheError: what came before is gone."""
        if tokens_to_remove not in (0, self.hfpatch_seen):  # old releases name the length to keep
            raise CacheError("A cropped cache cannot be rolled back; set crop_cache=False to crop or speculate.")

    def reset(self) -> None:
        """Back to an empty layer that keeps everything."""
        super().reset()
        for name in ("hfpatch_kept", "hfpatch_seen", _OPEN):
            self.__dict__.pop(name, None)
        self.__class__ = _Base

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (), self.__dict__


def _empty() -> CroppedLayer:
    return CroppedLayer.__new__(CroppedLayer)


def _cut(x: Tensor, keep: SinkWindow, starts: Tensor | None = None) -> Tensor:
    """First `sink` tokens from `starts [B]` on (from 0 without) and the last `window - 1` of `x [B, H, L, D]`."""
    length, recent = x.shape[-2], keep.window - 1
    if starts is None:
        if length <= keep.sink + recent:
            return x
        return torch.cat([x[..., : keep.sink, :], x[..., length - recent :, :]], dim=-2)
    sink = starts[:, None] + torch.arange(keep.sink, device=x.device)
    rows = torch.cat([sink, torch.arange(length - recent, length, device=x.device).expand(len(sink), -1)], dim=1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def check_croppable(cache: Any, slot: int | None, layer_idx: int | None) -> None:
    """Raise CacheError when the keys of layer `slot`, used by the module of `layer_idx`, cannot be dropped."""
    layer = cache_layer(cache, slot)
    if slot != layer_idx:
        raise CacheError("crop_cache=True needs modules that use one layer of the cache each; set crop_cache=False.")
    if type(layer) not in (DynamicLayer, _Base, CroppedLayer) or getattr(cache, "offloading", False):
        raise CacheError(
            f"crop_cache=True works with a DynamicCache on the model's device, not with {type(cache).__name__}; "
            "use that, or crop_cache=False."
        )


def open_layer(cache: Any, slot: int | None) -> None:
    """Announce a call by a method that knows what a cropped layer keeps."""
    layer = cache_layer(cache, slot)
    if isinstance(layer, CroppedLayer):
        layer.__dict__[_OPEN] = True


def kept_by(cache: Any, slot: int | None) -> SinkWindow | None:
    """What a cropped layer keeps; None for others."""
    layer = cache_layer(cache, slot)
    return layer.hfpatch_kept if isinstance(layer, CroppedLayer) else None


def crop_layer(cache: Any, slot: int | None, keep: SinkWindow, starts: list[int]) -> None:
    """Drop all keys but `keep` from one layer, whose rows begin at `starts [B]` and reach to its end."""
    layer: Any = cache_layer(cache, slot)
    first = torch.tensor(starts, device=layer.keys.device)
    layer.hfpatch_kept, layer.hfpatch_seen = keep, layer.get_seq_length()
    layer.keys, layer.values = _cut(layer.keys, keep, first), _cut(layer.values, keep, first)
    layer.__class__ = CroppedLayer
    mark_keys(layer)
