"""StreamingLLM's attention pattern: a few first tokens and a window of recent ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..config.common import dense_layers, phase, question_tokens
from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.evicting import check_own_keys
from ..core.method import Method
from ..core.selection import Causal, Rows, Selection, SinkWindow
from ..errors import ConfigError


@dataclass(kw_only=True)
class StreamingConfig(MethodConfig):
    """Settings of `streaming`; sizes in tokens."""

    method: ClassVar[str] = "streaming"
    sink: int = option(4, "first real tokens of each row that stay visible", ge=0)
    window: int = option(1024, "most recent tokens visible, the query's own included", ge=1)
    question_tokens: int = question_tokens(old="last_queries")
    dense_layers: int = dense_layers(" (TriangleMix)")
    phase: str = phase()
    crop_cache: bool = option(False, "keep only the keys that are still visible; needs a DynamicCache")

    def validate(self) -> None:
        if self.crop_cache and (self.phase != "both" or self.question_tokens):
            raise ConfigError(
                "streaming: crop_cache=True goes with phase='both' and question_tokens=0, which alone never look back "
                "at dropped keys."
            )


@register_method
class Streaming(Method[StreamingConfig]):
    """Sink + window; positions are kept. With `crop_cache` the cache drops what no query will see again.

    StreamingLLM, arXiv 2309.17453; tri-shape (`question_tokens`) and layer-wise use from MInference (2407.02490) and
    TriangleMix (2507.21526). The paper also re-indexes positions after eviction; keys are cached after RoPE here, so
    the pattern is valid up to the model's position limit.
    """

    summary = "sink tokens + recent window"
    paper = "https://arxiv.org/abs/2309.17453"
    positional = True
    reads = "positions"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "tri-shape": {"sink": 128, "window": 3968, "question_tokens": 128, "phase": "prefill"},
        "triangle-mix": {
            "sink": 8,
            "window": 512,
            "question_tokens": 128,
            "dense_layers": 16,
            "phase": "prefill",
        },
    }

    def __init__(self, config: StreamingConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.causality = "tile" if config.question_tokens else "yes"
        if config.crop_cache:
            self.retain, self.positional, self.keeps_first = self._retain, False, config.sink > 0

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        if self.config.crop_cache:
            check_own_keys(model, self.name)

    def _retain(self, call: AttentionCall) -> SinkWindow:
        return SinkWindow(self.config.sink, self.config.window)

    def select(self, call: AttentionCall) -> Selection | None:
        c = self.config
        pattern = SinkWindow(c.sink, c.window)
        asking = call.asking(c.question_tokens)
        if call.Lk <= c.sink + c.window or asking >= call.Lq:
            return None
        return Rows([(call.Lq - asking, pattern), (call.Lq, Causal())]) if asking else pattern
