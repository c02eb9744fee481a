"""Skip-softmax (BLASST): key tiles far below the running maximum are left out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.blocks import Grid, choosers, head_sharing, kept_blocks, pad_to
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import Selection

CHUNK_ROWS, CHUNK_KEYS = 1024, 4096


@dataclass(kw_only=True)
class SkipSoftmaxConfig(MethodConfig):
    """Settings of `skip_softmax`."""

    method: ClassVar[str] = "skip_softmax"
    prefill: float = option(1e-3, "threshold lambda in prefill", ge=0, le=1)
    decode: float = option(1e-4, "threshold lambda in decode", ge=0, le=1)
    prefill_scale: float | None = option(None, "lambda = scale / number of keys in prefill, instead", ge=0)
    decode_scale: float | None = option(None, "lambda = scale / number of keys in decode, instead", ge=0)
    block_q: int = option(128, "queries per tile", ge=1)
    block_k: int = option(128, "keys per tile", ge=1)
    head_sharing: str = head_sharing("head")
    phase: str = option("both", "where tiles are skipped", choices=("both", "prefill", "decode"))
    min_length: int = option(2048, "calls with fewer keys run dense", ge=0)


@register_method
class SkipSoftmax(Method):
    """A tile is skipped when in every row its maximum is -ln(lambda) or more below the maximum up to and with it.

    BLASST, arXiv 2512.12087. Logits count after soft-capping; sink logits stay out of the test. lambda <= 1 keeps
    every tile that raises a maximum, so skipped tiles never change it. Every logit is still computed: the choice is
    made in a pass of its own before attention, which saves memory traffic and time only in a fused kernel. The
    paper's fit is lambda = a / L with a per phase and target sparsity: `prefill_scale` and `decode_scale`.
    """

    config_class = SkipSoftmaxConfig
    summary = "tiles below the running maximum skipped"
    paper = "https://arxiv.org/abs/2512.12087"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "skip-softmax-qwen3-50": {"prefill_scale": 85.97, "decode_scale": 55.48},
        "skip-softmax-qwen3-70": {"prefill_scale": 469.03, "decode_scale": 254.23},
        "skip-softmax-qwen3-90": {"prefill_scale": 1418.14, "decode_scale": 863.14},
    }

    def __init__(self, config: SkipSoftmaxConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.settings = config
        self.acts_in = frozenset({"prefill", "decode"} if config.phase == "both" else {config.phase})
        self.causality = "yes" if config.phase == "decode" else "tile"

    def notes(self) -> list[str]:
        return [f"skip_softmax: calls with fewer than {self.settings.min_length} keys run dense (min_length)"]

    def threshold(self, call: AttentionCall) -> float:
        """ln(lambda) of this call."""
        s = self.settings
        fixed, scaled = (s.decode, s.decode_scale) if call.phase == "decode" else (s.prefill, s.prefill_scale)
        value = fixed if scaled is None else min(1.0, scaled / call.Lk)
        return math.log(value) if value > 0 else -math.inf

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        s = self.settings
        if call.Lk < s.min_length:
            return None
        grid = Grid.of(call.layout, s.block_q, s.block_k)
        block_q = grid.block_q
        out = torch.zeros(call.B, call.Hq, grid.nq, grid.nk, dtype=torch.bool, device=call.q.device)
        step = max(1, CHUNK_ROWS // (call.groups * block_q)) * block_q
        for h in range(call.Hkv):
            heads = slice(h * call.groups, (h + 1) * call.groups)
            for start in range(0, call.Lq, step):
                top = tile_maxima(call, h, start, min(start + step, call.Lq), grid.block_k)
                below = top - top.cummax(-1).values
                near = (below > self.threshold(call)) | (below == 0)
                tiles = pad_to(near.byte(), block_q, -2).unflatten(2, (-1, block_q)).amax(3).bool()
                n = start // block_q
                out[:, heads, n : n + tiles.shape[2], : tiles.shape[3]] = tiles
        return kept_blocks(grid, out.unflatten(1, (choosers(call.layout, s.head_sharing), -1)).any(2))


def tile_maxima(call: AttentionCall, head: int, start: int, stop: int, size: int) -> Tensor:
    """Largest logit `[B, G, rows, n]` of queries `start..stop` of a KV head in each tile of keys they see."""
    q = call.q[:, head * call.groups : (head + 1) * call.groups, start:stop].float() * call.scale
    rows = torch.arange(call.off + start, call.off + stop, device=q.device)[:, None]
    width, seen, out = max(1, CHUNK_KEYS // size) * size, call.off + stop, []
    for a in range(0, seen, width):
        z = min(a + width, seen)
        logits = q @ call.k[:, head : head + 1, a:z].float().mT
        if call.softcap is not None:
            logits = torch.tanh(logits / call.softcap) * call.softcap
        if z > call.off + start + 1:
            logits.masked_fill_(torch.arange(a, z, device=q.device) > rows, -torch.inf)
        out.append(pad_to(logits, size, -1, -torch.inf).unflatten(-1, (-1, size)).amax(-1))
    return torch.cat(out, -1)
