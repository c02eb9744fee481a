"""Static block patterns that depend on positions alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config.common import SHARES, phase, question_tokens
from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.blocks import Grid, choosers, kept_blocks
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import Causal, Layout, Rows, Selection
from ..runtime.model_facts import text_config

BLOCK = {"sliding": 256, "slash": 256, "dilated": 256, "power": 256, "s2": 64}
WINDOW = {"sliding": 9, "slash": 6, "dilated": 1, "power": 5, "s2": 16}
SINK = {"sliding": 1, "slash": 1, "dilated": 0, "power": 1, "s2": 0}
STRIDE = {"sliding": 1, "slash": 32, "dilated": 2, "power": 1, "s2": 8}


@dataclass(kw_only=True)
class PatternConfig(MethodConfig):
    """Settings of `pattern`; strides in blocks, None for the pattern's own value."""

    method: ClassVar[str] = "pattern"
    pattern: str = option("sliding", "which rule chooses the key blocks", choices=tuple(BLOCK))
    block: int | None = option(None, "tokens per block: 256, for s2 64", ge=1)
    window_blocks: int | None = option(
        None, "recent blocks: sliding 9, slash 6, dilated 1, power 5, s2 16", ge=1, old="window"
    )
    sink_blocks: int | None = option(None, "first blocks: sliding, slash and power 1, others 0", ge=0, old="sink")
    stride: int | None = option(None, "distance of far blocks: slash 32, dilated 2, s2 8", ge=1)
    count: int = option(20, "blocks a dilated row sees in all", ge=1)
    slashes: int = option(3, "far diagonals of slash", ge=0)
    head_sharing: str = option(
        "group", "s2: a shard per KV head, per query head, or one for all", choices=SHARES, old="share"
    )
    question_tokens: int = question_tokens()
    phase: str = phase()

    def value(self, name: str, defaults: Mapping[str, int]) -> int:
        """The setting, or the pattern's own value."""
        given = getattr(self, name)
        return defaults[self.pattern] if given is None else given


@register_method
class Pattern(Method[PatternConfig]):
    """Key block J of query block I = J + d stays by a rule on J, d and the head h; blocks count from the first token.

    sliding: d < window or J < sink. slash: also d a multiple of stride, up to `slashes` of them. dilated: every
    stride-th block, `count` in all. power (PowerAttention, arXiv 2503.03588): d < window, d a power of two, or
    J < sink. s2 (S2-Attention, 2407.17678): d < window or (J + h max(1, stride // H) + 1) a multiple of stride, where
    H shards are the KV heads unless `head_sharing` says otherwise. The papers trained their models with power and s2:
    on a model trained densely both are ablations, and PowerAttention itself reports far weaker retrieval then. The
    paper leaves 2 of every 7 layers dense on RULER: use `layers`.
    """

    summary = "static block patterns: sliding, slash, dilated, power, s2"
    paper = "https://arxiv.org/abs/2503.03588"
    reads = "positions"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "power-attention": {"pattern": "power"},
        "s2-attention": {"pattern": "s2"},
    }

    def __init__(self, config: PatternConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.block = config.value("block", BLOCK)
        self.window, self.sink = config.value("window_blocks", WINDOW), config.value("sink_blocks", SINK)
        self.stride = config.value("stride", STRIDE)
        self.uncovered: str | None = None
        self._last: tuple[tuple[Layout, int], Selection | None] | None = None
        self.causality = "tile" if config.question_tokens else "yes"

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        text = text_config(model)
        hq = getattr(text, "num_attention_heads", None) or 0
        heads = {"head": hq, "group": getattr(text, "num_key_value_heads", None) or hq, "all": 1}[
            self.config.head_sharing
        ]
        if self.config.pattern == "s2" and 0 < heads < self.stride:
            self.uncovered = (
                f"s2: {heads} shards with a stride of {self.stride} see {heads}/{self.stride} of the far past "
                f"between them; a stride of {heads} covers it"
            )

    def notes(self) -> list[str]:
        return [self.uncovered] if self.uncovered else []

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection | None:
        of = call.layout, call.asking(self.config.question_tokens)
        last = self._last
        if last is None or last[0] != of:  # all layers of a pass ask for the same
            with torch.inference_mode(False):  # a later call may be one of training
                last = self._last = of, self._selection(*of)
        return last[1]

    def _selection(self, at: Layout, asking: int) -> Selection | None:
        stop = at.Lq - asking
        if at.Lk <= self.block or not stop:
            return None
        head = min(-at.off % self.block, stop)
        parts = [(z, self._part(at, a, z)) for a, z in ((0, head), (head, stop)) if z > a]
        if asking:
            parts.append((at.Lq, Causal()))
        return parts[0][1] if len(parts) == 1 else Rows(parts)

    def _part(self, at: Layout, start: int, stop: int) -> Selection:
        """Queries `start..stop`, where every tile but the first range's begins at a block."""
        grid = Grid.of(at.rows(start, stop), self.block, self.block)
        heads = choosers(at, self.config.head_sharing) if self.config.pattern == "s2" else 1
        h = torch.arange(heads, device=at.device)[:, None, None]
        keep = self.rule(h, (grid.first // self.block)[:, None], grid.blocks[None])
        return kept_blocks(grid, keep.expand(heads, grid.nq, grid.nk)[None])

    def rule(self, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether query blocks `i [nQ, 1]` of heads `h [H, 1, 1]` see key blocks `j [1, nK]`; causality aside."""
        d = i - j
        name, stride = self.config.pattern, self.stride
        near = ((d < self.window) | (j < self.sink))[None]
        if name == "slash":
            return near | ((d % stride == 0) & (d <= stride * self.config.slashes))
        if name == "dilated":
            return near | ((d % stride == 0) & (d < stride * self.config.count))
        if name == "power":
            return near | ((d & (d - 1)) == 0)
        if name == "s2":
            return near | ((j + h * max(1, stride // h.shape[0]) + 1) % stride == 0)
        return near
