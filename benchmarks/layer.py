"""One layer's random tensors, for benchmarks of methods that are run without a model."""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hfpatch.core.call import AttentionCall
from hfpatch.core.method import Method
from hfpatch.core.selection import Selection, intersect
from hfpatch.ops import attend


class Layer:
    """One layer's tensors and, if given, the methods of a patch on it."""

    def __init__(self, args: argparse.Namespace, length: int, extra: int, methods: list[Method]) -> None:
        g = torch.Generator(args.device).manual_seed(0)
        dtype = getattr(torch, args.dtype)

        def random(heads: int, n: int) -> Tensor:
            made = torch.randn(1, n, heads, args.dim, generator=g, device=args.device)
            return made.to(dtype).transpose(1, 2)

        self.q = random(args.heads, length + extra)
        self.k, self.v = (random(args.kv_heads, length + extra).contiguous() for _ in range(2))
        self.length, self.scale, self.executor, self.methods = length, args.dim**-0.5, args.executor, methods
        self.states: dict[tuple[int, ...], dict[str, Any]] = {}

    def call(self, phase: str, start: int, stop: int) -> AttentionCall:
        """Queries `start..stop` over the keys before `stop`."""
        k, v = self.k[:, :, :stop], self.v[:, :, :stop]
        return AttentionCall(0, 1, phase, self.q[:, :, start:stop], k, v, self.scale, rows=(0,), states=self.states)

    def select(self, call: AttentionCall) -> Selection | None:
        """What the methods choose together."""
        chosen: Selection | None = None
        for m in self.methods:
            if call.phase in m.acts_in:
                chosen = intersect(chosen, m.select(call))
        return chosen

    def dense(self, call: AttentionCall) -> Tensor:
        """Torch's own attention."""
        return F.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=call.Lq > 1, scale=self.scale, enable_gqa=True
        )

    def attend(self, call: AttentionCall, chosen: Selection | None, executor: str | None = None) -> Any:
        """Attention over the chosen keys."""
        return attend(call.q, call.k, call.v, selection=chosen, scale=self.scale, executor=executor or self.executor)
