"""Attention received by every key, summed over queries, without the whole weight matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.call import AttentionCall, rows_on
from ..core.logits import causal, logits, weights

CHUNK_ELEMENTS = 1 << 22


@dataclass(eq=False)
class ColumnSums:
    """Dense attention to each key `sums [B, H, Lk]` of some heads, over `counts [Lk]` queries that could see it."""

    sums: Tensor
    counts: Tensor
    cropped: bool = False

    @classmethod
    def of(cls, call: AttentionCall, earlier: "ColumnSums | None", heads: list[int]) -> "ColumnSums":
        """The call's sums over the query heads `heads`, added to those of earlier calls."""
        sums = call.q.new_zeros((call.B, len(heads), call.Lk), dtype=torch.float32)
        counts = sums.new_zeros(call.Lk)
        if earlier is not None:
            known = min(earlier.counts.shape[0], call.Lk)
            sums[..., :known] = earlier.sums[..., :known]
            counts[:known] = earlier.counts[:known]
        step = max(1, CHUNK_ELEMENTS // (call.B * len(heads) * call.Lk))
        for start in range(0, call.Lq, step):
            part = _weights(call, heads, start, min(start + step, call.Lq))
            sums[..., : part.shape[-1]] += part.sum(2)
        counts += call.Lk - call.k_pos.clamp(min=call.off)
        return cls(sums, counts)

    def means(self) -> Tensor:
        """Mean attention `[B, H, Lk]` to each key."""
        return self.sums / self.counts.clamp(min=1)

    def reorder(self, index: Tensor) -> "ColumnSums":
        """The sums of batch rows `index`."""
        return ColumnSums(self.sums.index_select(0, index.to(self.sums.device)), self.counts, self.cropped)

    def crop(self, length: int) -> None:
        """Forget keys from `length` on; what the dropped queries gave to earlier keys stays in sums and counts."""
        self.cropped = self.cropped or length < self.counts.shape[0]
        self.sums, self.counts = self.sums[..., :length], self.counts[:length]


def _weights(call: AttentionCall, heads: list[int], start: int, stop: int) -> Tensor:
    """Softmax weights `[B, H, R, C]` in float32 of queries `start..stop`, over the keys up to the last of them."""
    seen = call.off + stop
    of, kv = (rows_on(call.q.device, tuple(n)) for n in (heads, [h // call.groups for h in heads]))
    q = call.q[:, of, start:stop].float()
    k = call.k[:, kv, :seen].float()  # [B, H, seen, D]
    bias = None if call.bias is None else call.bias[..., :seen]
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, of]
    every = logits(q, k, scale=call.scale, softcap=call.softcap, bias=bias)
    past = causal(every, call.q_pos[start:stop], call.k_pos[:seen])
    return weights(past, None if call.sinks is None else call.sinks[of])
