"""Skip-softmax (BLASST): key tiles far below the running maximum are left out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.common import head_sharing, phase
from ..config.method_config import option
from ..config.registry import register_method
from ..core.block_selector import BlockConfig, BlockSelector
from ..core.blocks import Grid, pad_to
from ..core.call import AttentionCall
from ..core.logits import logits

CHUNK_ROWS, CHUNK_KEYS = 1024, 4096


@dataclass(kw_only=True)
class SkipSoftmaxConfig(BlockConfig):
    """Settings of `skip_softmax`."""

    method: ClassVar[str] = "skip_softmax"
    prefill: float = option(1e-3, "threshold lambda in prefill", ge=0, le=1)
    decode: float = option(1e-4, "threshold lambda in decode", ge=0, le=1)
    prefill_scale: float | None = option(None, "lambda = scale / number of keys in prefill, instead", ge=0)
    decode_scale: float | None = option(None, "lambda = scale / number of keys in decode, instead", ge=0)
    head_sharing: str = head_sharing("head")
    phase: str = phase()


@register_method
class SkipSoftmax(BlockSelector[SkipSoftmaxConfig]):
    """A tile is skipped when in every row its maximum is -ln(lambda) or more below the maximum up to and with it.

    BLASST, arXiv 2512.12087. Logits count after soft-capping and with the bias of methods before this one; sink
    logits stay out of the test. lambda <= 1 keeps every tile that raises a maximum, so skipped tiles never change it.
    Every logit is still computed: the choice is made in a pass of its own before attention, which saves memory traffic
    and time only in a fused kernel. The paper's fit is lambda = a / L with a per phase and target sparsity:
    `prefill_scale` and `decode_scale`.
    """

    summary = "tiles below the running maximum skipped"
    paper = "https://arxiv.org/abs/2512.12087"
    acts_in = frozenset({"prefill", "decode"})
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "skip-softmax-qwen3-50": {"prefill_scale": 85.97, "decode_scale": 55.48},
        "skip-softmax-qwen3-70": {"prefill_scale": 469.03, "decode_scale": 254.23},
        "skip-softmax-qwen3-90": {"prefill_scale": 1418.14, "decode_scale": 863.14},
    }

    def __init__(self, config: SkipSoftmaxConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.causality = "yes" if config.phase == "decode" else "tile"

    def threshold(self, call: AttentionCall) -> float:
        """ln(lambda) of this call."""
        c = self.config
        fixed, scaled = (c.decode, c.decode_scale) if call.phase == "decode" else (c.prefill, c.prefill_scale)
        value = fixed if scaled is None else min(1.0, scaled / call.Lk)
        return math.log(value) if value > 0 else -math.inf

    def scores(self, call: AttentionCall, grid: Grid) -> Tensor:
        """Bool: some row of the tile, of some of the heads that share, comes near its running maximum."""
        size, threshold = grid.block_q, self.threshold(call)
        keep = torch.zeros(call.B, call.Hq, grid.nq, grid.nk, dtype=torch.bool, device=call.q.device)
        step = max(1, CHUNK_ROWS // (call.groups * size)) * size
        for head in range(call.Hkv):
            heads = slice(head * call.groups, (head + 1) * call.groups)
            for start in range(0, call.Lq, step):
                top = tile_maxima(call, head, start, min(start + step, call.Lq), grid.block_k)
                below = top - top.cummax(-1).values  # [B, G, rows, n]
                near = (below > threshold) | (below == 0)
                tiles = pad_to(near.byte(), size, -2).unflatten(2, (-1, size)).amax(3).bool()  # [B, G, tiles, n]
                n = start // size
                keep[:, heads, n : n + tiles.shape[2], : tiles.shape[3]] = tiles
        return self.sharing(keep, grid).any(2)


def tile_maxima(call: AttentionCall, head: int, start: int, stop: int, size: int) -> Tensor:
    """Largest logit `[B, G, rows, n]` of queries `start..stop` of a KV head in each tile of keys they see."""
    heads = slice(head * call.groups, (head + 1) * call.groups)
    q, bias = call.q[:, heads, start:stop].float(), call.bias
    if bias is not None and bias.shape[1] > 1:
        bias = bias[:, heads]
    rows = torch.arange(call.off + start, call.off + stop, device=q.device)[:, None]
    width, seen, out = max(1, CHUNK_KEYS // size) * size, call.off + stop, []
    for a in range(0, seen, width):
        z = min(a + width, seen)
        own = None if bias is None else bias[..., a:z]
        part = logits(q, call.k[:, head : head + 1, a:z].float(), scale=call.scale, softcap=call.softcap, bias=own)
        if z > call.off + start + 1:
            part.masked_fill_(torch.arange(a, z, device=q.device) > rows, -torch.inf)
        out.append(pad_to(part, size, -1, -torch.inf).unflatten(-1, (-1, size)).amax(-1))
    return torch.cat(out, -1)
