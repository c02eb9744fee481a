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
from ..core.blocks import choosers, tokens_of, tokens_within
from ..core.call import AttentionCall
from ..core.graph_step import GraphKeys, GraphStep, gathered
from ..core.method import Method
from ..core.selection import BlockMap, Layout, Selection

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
    after RoPE: padded rows choose as they would alone with the positions that `generate` gives them. After a method
    that drops keys it chooses among the rest: ["rocket-prompt", "rocket-decode"] is RocketKV, arXiv 2502.14051.
    """

    summary = "decode over the pages with the highest bounds"
    paper = "https://arxiv.org/abs/2406.10774"
    acts_in = frozenset({"decode"})
    stateful = True
    compiles = True
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quest-paper": {"dense_layers": 2, "head_sharing": "head"},
        "rocket-decode": {"page": 4, "budget": 256},
    }

    def __init__(self, config: QuestConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self._last: tuple[tuple[int, torch.device], Tensor] | None = None

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
        bounds = pages.bounds(call.q[:, :, 0], choosers(call.layout, c.head_sharing))
        bounds[..., -1] = torch.inf
        count = min(self._count(tokens), bounds.shape[-1])
        indices = bounds.topk(count, dim=-1, sorted=False).indices[:, :, None]
        return PageLists(indices, self._counts(count, call.q.device).expand(indices.shape[:3]), 1, c.page)

    def _count(self, tokens: int) -> int:
        return max(FEWEST_PAGES, -(-tokens // self.config.page))

    def _most(self, capacity: int) -> int | None:
        """Pages that a step in a graph looks at; None where no step of such a cache chooses.

        As many as are dense below `min_length`: sizes stay the same in a graph.
        """
        c = self.config
        if capacity < c.min_length or (isinstance(c.budget, int) and capacity <= c.budget):
            return None
        return min(self._count(max(tokens_of(c.budget, capacity), c.min_length)), -(-capacity // c.page))

    def graph_state(
        self, call: AttentionCall, capacity: int, before: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Maxima and minima of all pages that the cache has room for, `ends [B, Hkv, n, 2 D]`."""
        if self._most(capacity) is None:
            return {}
        size, n = self.config.page, -(-call.Lk // self.config.page)
        if before is not None and n:  # not a row of padding alone
            high, low = before["ends"][:, :, n - 1].chunk(2, -1)
            torch.aminmax(call.k[:, :, (n - 1) * size :], dim=2, out=(low, high))
            return dict(before)
        pages = Pages(size, call.k)
        pages.update(call.k)
        ends = call.k.new_zeros(call.B, call.Hkv, -(-capacity // size), 2 * call.k.shape[3])
        ends[:, :, :n] = pages.ends[:, :, :n]
        return {"ends": ends}

    @torch.no_grad()
    def graph_select(self, step: GraphStep) -> GraphKeys | None:
        c, call, most = self.config, step.call, self._most(step.capacity)
        if most is None:
            return None
        ends, own = step.state["ends"], (step.length - 1) // c.page  # [B|1, 1]
        self._update(step, ends, own)
        q = call.q[:, :, 0] if _fast(call.q) else call.q[:, :, 0].float()
        signed = torch.stack([q.clamp_min(0), q.clamp_max(0)], 2)
        bounds = upper_bounds(signed, ends, choosers(step.layout, c.head_sharing))
        page = torch.arange(ends.shape[2], device=ends.device)
        bounds = bounds.masked_fill((page > own)[:, None], -torch.inf).masked_fill((page == own)[:, None], torch.inf)
        chosen = bounds.topk(most, dim=-1).indices  # [B, H, most]
        few, short = self._budget(step.length)[:, None], (step.length < c.min_length)[:, None]
        listed = (torch.arange(most, device=ends.device) < few) | short  # [B|1, 1, most]
        at = chosen[..., None] * c.page + torch.arange(c.page, device=ends.device)
        return GraphKeys(at.flatten(2), listed.expand_as(chosen).repeat_interleave(c.page, 2))

    def _budget(self, length: Tensor) -> Tensor:
        """Pages `[B|1, 1]` to choose for rows of `length` tokens."""
        c = self.config
        if isinstance(c.budget, int):
            return torch.full_like(length, self._count(c.budget))
        tokens = tokens_within(c.budget, length)
        return (-(-tokens // c.page)).clamp_min(FEWEST_PAGES)

    def _update(self, step: GraphStep, ends: Tensor, own: Tensor) -> None:
        """Take the keys of each row's last page, `own [B|1, 1]`, into `ends`, in place."""
        k, size = step.call.k, self.config.page
        own = own.expand(len(k), 1)
        at = own * size + torch.arange(size, device=k.device)  # [B, page]
        keys = gathered(k, step.slots(at[:, None]))  # [B, Hkv, page, D]
        later = (at >= step.length)[:, None, :, None]
        high, low = keys.masked_fill(later, -torch.inf).amax(2), keys.masked_fill(later, torch.inf).amin(2)
        rows, heads = (torch.arange(n, device=k.device) for n in k.shape[:2])
        ends.index_put_((rows[:, None], heads, own), torch.cat([high, low], -1))

    def _counts(self, count: int, device: torch.device) -> Tensor:
        """The number on the device; kept, since all layers of a step have the same."""
        last = self._last
        if last is None or last[0] != (count, device):
            with torch.inference_mode(False):  # a later step may be one of training
                last = self._last = (count, device), torch.full((), count, device=device)
        return last[1]


def upper_bounds(signed: Tensor, ends: Tensor, heads: int) -> Tensor:
    """Bounds `[B, H, n]` of queries' positive and negative parts `signed [B, Hq, 2, D]` by `ends [B, Hkv, n, 2 D]`.

    Added up over the heads that share one of the `heads` choices; in the dtype of `signed`.
    """
    kv = ends.shape[1]
    parts = signed.flatten(2).unflatten(1, (kv, -1))  # [B, Hkv, G, 2 D]
    if heads <= kv:
        parts = parts.sum(2, keepdim=True)
    bounds = (parts @ ends.to(signed.dtype).mT).flatten(1, 2)
    return bounds if heads >= kv else bounds.sum(1, keepdim=True)


def _fast(q: Tensor) -> bool:
    """Whether products in bfloat16 are fast enough to do without float32: on a GPU."""
    return q.device.type != "cpu" and q.dtype == torch.bfloat16


class PageLists(BlockMap):
    """Full lists of pages for one query, the last page in all of them: counted without a look."""

    def attended(self, at: Layout) -> int:  # type: ignore[override]
        whole = (self.indices.shape[-1] - 1) * self.block_k
        return at.B * at.Hq * (whole + 1 + (at.Lk - 1) % self.block_k)


class Pages:
    """Elementwise maximum and minimum of the keys of each page, kept as keys arrive.

    `ends [B, Hkv, capacity, 2 D]` has the maxima first, so that one product gives a bound.
    """

    def __init__(self, size: int, k: Tensor) -> None:
        self.size, self.length = size, 0
        self.ends = self._space(k)
        self.limits: tuple[Tensor, Tensor] | None = None

    @property
    def high(self) -> Tensor:
        """Maxima `[B, Hkv, capacity, D]`."""
        return self.ends.chunk(2, -1)[0]

    @property
    def low(self) -> Tensor:
        """Minima `[B, Hkv, capacity, D]`."""
        return self.ends.chunk(2, -1)[1]

    def update(self, k: Tensor) -> None:
        """Take in `k [B, Hkv, Lk, D]`, all keys so far; pages that were full before are not read again."""
        length = k.shape[2]
        locked = self.ends.is_inference() and not torch.is_inference_mode_enabled()
        if length <= self.length or locked or self.ends.device != k.device or self.ends.shape[:2] != k.shape[:2]:
            self.length = 0
        first, whole, n = self.length // self.size, length // self.size, -(-length // self.size)
        if not self.length:
            self.ends = self._space(k)
        elif n > self.ends.shape[2]:
            ends, old = self._space(k), self.ends.shape[2]
            ends[:, :, :old] = self.ends
            self.ends = ends
        new, high, low = k[:, :, first * self.size :], self.high, self.low
        if whole > first and n > first + 1:
            full = new[:, :, : (whole - first) * self.size].unflatten(2, (-1, self.size))
            torch.amax(full, 3, out=high[:, :, first:whole])
            torch.amin(full, 3, out=low[:, :, first:whole])
            new, first = new[:, :, (whole - first) * self.size :], whole
        if n > first:
            torch.aminmax(new, dim=2, out=(low[:, :, first], high[:, :, first]))
        self.length = length

    def _space(self, k: Tensor) -> Tensor:
        b, h, length, d = k.shape
        n = -(-length // self.size)
        return k.new_zeros(b, h, n + n // 8 + 8, 2 * d)

    def bounds(self, q: Tensor, heads: int | None = None) -> Tensor:
        """Upper bounds `[B, H, n]` of `q [B, Hq, D]` times any key of each page, added up if heads share one."""
        q = q if _fast(q) else q.float()
        ends = self.ends[:, :, : -(-self.length // self.size)]
        return upper_bounds(q[:, :, None].clamp(*self._signs(q)), ends, heads or q.shape[1])

    def _signs(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What of a query meets maxima and what minima: limits `[2, 1]`."""
        if self.limits is None or self.limits[0].device != q.device or self.limits[0].dtype != q.dtype:
            low = torch.zeros(2, 1, dtype=q.dtype, device=q.device)
            low[1] = -torch.inf
            self.limits = low, -low.flip(0)
        return self.limits

    def reorder(self, index: Tensor) -> "Pages":
        """The pages of rows `index [n]`."""
        out = copy.copy(self)
        out.ends = self.ends.index_select(0, index.to(self.ends.device))
        return out

    def crop(self, length: int) -> None:
        """Forget the keys from `length` on, and the page they share with earlier ones."""
        self.length = min(self.length, length // self.size * self.size)
