"""Quest: at each decoded token, the pages of keys with the highest possible score."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.common import dense_layers, head_sharing, min_length
from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.blocks import choosers, tokens_of
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import BlockMap, Selection

FEWEST_PAGES = 3


@dataclass(kw_only=True)
class QuestConfig(MethodConfig):
    """Settings of `quest`."""

    method: ClassVar[str] = "quest"
    budget: int | float = option(
        1024, "keys per decoded token: tokens, or a share of the visible ones", gt=0, share=True
    )
    page: int = option(16, "keys per page", ge=1)
    dense_layers: int = dense_layers("; the paper's code uses 2")
    head_sharing: str = head_sharing()
    min_length: int = min_length()


@register_method
class Quest(Method[QuestConfig]):
    """Elementwise minimum and maximum of each page's keys bound q k from above; the top pages are attended.

    Quest, arXiv 2406.10774. At least three pages are kept, the current one among them. The paper chooses per query
    head (head_sharing="head"); heads that share a choice add their bounds up. Prefill stays dense. Bounds are of keys
    after RoPE: padded rows choose as they would alone with the positions that `generate` gives them.
    """

    summary = "decode over the pages with the highest bounds"
    paper = "https://arxiv.org/abs/2406.10774"
    acts_in = frozenset({"decode"})
    stateful = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quest-paper": {"dense_layers": 2, "head_sharing": "head"}
    }

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        c = self.config
        tokens = tokens_of(c.budget, call.Lk)
        if call.Lq != 1 or self.too_short(call) or (isinstance(c.budget, int) and call.Lk <= tokens):
            return None
        name = f"quest.{c.page}"
        if name not in call.state:
            call.state[name] = Pages(c.page, call.k)
        pages = call.state[name]
        pages.update(call.k)
        bounds = pages.bounds(call.q[:, :, 0]).unflatten(1, (choosers(call.layout, c.head_sharing), -1)).sum(2)
        bounds[..., -1] = torch.inf
        count = min(max(FEWEST_PAGES, -(-tokens // c.page)), bounds.shape[-1])
        indices = bounds.topk(count, dim=-1, sorted=False).indices[:, :, None]
        return BlockMap(indices, torch.full_like(indices[..., 0], count), 1, c.page)


class Pages:
    """Elementwise minimum and maximum `[B, Hkv, capacity, D]` of the keys of each page, kept as keys arrive."""

    def __init__(self, size: int, k: Tensor) -> None:
        self.size, self.length = size, 0
        self.low, self.high = self._space(k)

    def update(self, k: Tensor) -> None:
        """Take in `k [B, Hkv, Lk, D]`, all keys so far; pages that were full before are not read again."""
        length = k.shape[2]
        locked = self.low.is_inference() and not torch.is_inference_mode_enabled()
        if length <= self.length or locked or self.low.device != k.device or self.low.shape[:2] != k.shape[:2]:
            self.length = 0
        first, whole, n = self.length // self.size, length // self.size, -(-length // self.size)
        if not self.length:
            self.low, self.high = self._space(k)
        elif n > self.low.shape[2]:
            (low, high), old = self._space(k), self.low.shape[2]
            low[:, :, :old], high[:, :, :old] = self.low, self.high
            self.low, self.high = low, high
        new = k[:, :, first * self.size :]
        if whole > first:
            full = new[:, :, : (whole - first) * self.size].unflatten(2, (-1, self.size))
            self.low[:, :, first:whole], self.high[:, :, first:whole] = full.amin(3), full.amax(3)
        if n > whole:
            rest = new[:, :, (whole - first) * self.size :]
            self.low[:, :, whole], self.high[:, :, whole] = rest.amin(2), rest.amax(2)
        self.length = length

    def _space(self, k: Tensor) -> tuple[Tensor, Tensor]:
        b, h, length, d = k.shape
        n = -(-length // self.size)
        return k.new_zeros(b, h, n + n // 8 + 8, d), k.new_zeros(b, h, n + n // 8 + 8, d)

    def bounds(self, q: Tensor) -> Tensor:
        """Upper bounds `[B, Hq, n]` in float32 of `q [B, Hq, D]` times any key of each page."""
        n = -(-self.length // self.size)
        q = q.float().unflatten(1, (self.low.shape[1], -1))  # [B, Hkv, G, D]
        low, high = self.low[:, :, :n].float(), self.high[:, :, :n].float()
        return (q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT).flatten(1, 2)

    def reorder(self, index: Tensor) -> "Pages":
        """The pages of rows `index [n]`."""
        out = copy.copy(self)
        out.low, out.high = (x.index_select(0, index.to(x.device)) for x in (self.low, self.high))
        return out

    def crop(self, length: int) -> None:
        """Forget the keys from `length` on, and the page they share with earlier ones."""
        self.length = min(self.length, length // self.size * self.size)
