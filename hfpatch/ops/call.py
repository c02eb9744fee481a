"""One attention problem, checked once, as every executor sees it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfpatch.core.selection import Causal, Layout, Selection
from hfpatch.errors import ExecutorError


@dataclass(frozen=True)
class Attended:
    """What an executor returns: `out [B, Lq, Hq, Dv]`, `lse [B, Hq, Lq]` (float32, natural log, sinks included)."""

    out: Tensor
    lse: Tensor
    executor: str


@dataclass(frozen=True)
class Problem:
    """Inputs of `attend`: `q [B, Hq, Lq, D]`, `k [B, Hkv, Lk, D]`, `v [B, Hkv, Lk, Dv]`, `bias [B|1, Hq|1, Lk]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None

    @property
    def at(self) -> Layout:
        """Sizes of the problem."""
        (b, hq, lq, _), (_, hkv, lk, _) = self.q.shape, self.k.shape
        return Layout(b, hq, hkv, lq, lk, self.q.device)

    @property
    def groups(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for gradients of this call."""
        inputs = (self.q, self.k, self.v, self.sinks, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)

    def rows(self, start: int, stop: int, selection: Selection) -> "Problem":
        """The problem of queries `start..stop` and the keys up to the last of them."""
        lk = self.at.off + stop
        return replace(
            self,
            q=self.q[:, :, start:stop],
            k=self.k[:, :, :lk],
            v=self.v[:, :, :lk],
            bias=None if self.bias is None else self.bias[:, :, :lk],
            selection=selection,
        )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Problem:
    """Raise `ExecutorError` on shapes that do not fit together, else return the `Problem`."""
    sizes = q.shape, k.shape, v.shape
    if not (len(sizes[0]) == len(sizes[1]) == len(sizes[2]) == 4):
        raise ExecutorError("attend() takes q, k and v of shape [batch, heads, length, head_dim].")
    (b, hq, lq, d), (_, hkv, lk, _), _ = sizes
    if sizes[1] != (b, hkv, lk, d) or sizes[2][:3] != (b, hkv, lk):
        raise ExecutorError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together.")
    if hkv == 0 or hq % hkv:
        raise ExecutorError(f"{hq} query heads cannot share {hkv} key-value heads evenly.")
    if lq > lk:
        raise ExecutorError(f"There are {lq} queries and only {lk} keys; k must include the queries' own tokens.")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise ExecutorError(f"q, k and v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}.")
    if sinks is not None and sinks.shape != (hq,):
        raise ExecutorError(f"sinks must have shape [{hq}] (one logit per query head), not {list(sinks.shape)}.")
    if bias is not None and not (
        bias.dim() == 3 and bias.shape[0] in (1, b) and bias.shape[1] in (1, hq) and bias.shape[2] == lk
    ):
        raise ExecutorError(f"bias must have shape [{b} or 1, {hq} or 1, {lk}], not {list(bias.shape)}.")
    return Problem(q, k, v, Causal() if selection is None else selection, scale, softcap, sinks, bias)
