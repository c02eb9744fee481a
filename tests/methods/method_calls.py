"""Calls and methods that the tests of methods share, and the comparison of executors with a method's own mask."""

from typing import Any

import torch
from torch import Tensor

from hfpatch.config.registry import get_method, make_config
from hfpatch.core.call import AttentionCall
from hfpatch.core.method import Method
from hfpatch.core.selection import Causal
from hfpatch.ops import attend

SHAPES = {
    "L63-mha": (1, 4, 4, 63, 63),
    "L111-gqa4": (3, 8, 2, 111, 111),
    "L257-mqa8": (1, 8, 1, 257, 257),
    "chunk50of161": (3, 4, 2, 50, 161),
    "chunk64of128": (1, 4, 1, 64, 128),
    "chunk7of63": (1, 4, 2, 7, 63),
}
DECODES = {"decode63": (1, 4, 4, 1, 63), "decode111": (3, 8, 2, 1, 111), "decode257": (1, 8, 1, 1, 257)}


def make_call(
    shape: tuple[int, int, int, int, int], dim: int = 16, dv: int = 16, seed: int = 0, **fields: Any
) -> AttentionCall:
    """A call `(B, Hq, Hkv, Lq, Lk)` with random tensors whose keys drift slowly, so that blocks differ."""
    b, hq, hkv, lq, lk = shape
    g = torch.Generator().manual_seed(seed)
    drift = torch.randn(b, hkv, lk // 5 + 2, dim, generator=g).repeat_interleave(5, 2)[:, :, :lk]
    q = 1.5 * torch.randn(b, hq, lq, dim, generator=g)
    k = drift + 0.7 * torch.randn(b, hkv, lk, dim, generator=g)
    v = torch.randn(b, hkv, lk, dv, generator=g)
    phase = "decode" if lq == 1 else "prefill" if lq == lk else "chunk"
    return AttentionCall(layer=3, num_layers=8, phase=phase, q=q, k=k, v=v, scale=dim**-0.5, **fields)


def make_method(name: str, **settings: Any) -> Method:
    """A method built from its name and settings."""
    return get_method(name)(make_config(name, settings))


def chosen_mask(method: Method, call: AttentionCall) -> Tensor:
    """Bool `[B, Hq, Lq, Lk]` of what the method selects; all earlier keys for None."""
    at = call.layout
    return (method.select(call) or Causal()).mask(at).expand(at.B, at.Hq, at.Lq, at.Lk)


def check_executors(method: Method, call: AttentionCall) -> None:
    """The torch executor gives the dense softmax restricted to the method's own mask; density is the counted one."""
    selection, at = method.select(call), call.layout
    keep = chosen_mask(method, call)
    k, v = (x.repeat_interleave(call.groups, 1).double() for x in (call.k, call.v))
    logits = call.scale * call.q.double() @ k.mT
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    want = (logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v).transpose(1, 2).float()
    for name in ("reference", "torch"):
        got = attend(
            call.q, call.k, call.v, selection=selection, scale=call.scale, softcap=call.softcap, executor=name
        ).out
        assert (got - want).abs().max() <= 2e-5 * want.abs().max(), name
    if selection is not None:
        assert int(selection.attended(at)) == int(keep.sum())
