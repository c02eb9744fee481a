"""StreamingLLM's attention pattern: a few first tokens and a window of recent ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..config.common import dense_layers, phase, question_tokens
from ..config.method_config import MethodConfig, option
from ..config.registry import register_method
from ..core.call import AttentionCall
from ..core.method import Method
from ..core.selection import Causal, Rows, Selection, SinkWindow


@dataclass(kw_only=True)
class StreamingConfig(MethodConfig):
    """Settings of `streaming`; sizes in tokens."""

    method: ClassVar[str] = "streaming"
    sink: int = option(4, "first real tokens of each row that stay visible", ge=0)
    window: int = option(1024, "most recent tokens visible, the query's own included", ge=1)
    question_tokens: int = question_tokens(old="last_queries")
    dense_layers: int = dense_layers(" (TriangleMix)")
    phase: str = phase()


@register_method
class Streaming(Method[StreamingConfig]):
    """Sink + window; positions are kept, nothing is evicted from the cache.

    StreamingLLM, arXiv 2309.17453; tri-shape (`question_tokens`) and layer-wise use from MInference (2407.02490) and
    TriangleMix (2507.21526). The paper also re-indexes positions after eviction; keys are cached after RoPE here, so
    the pattern is valid up to the model's position limit.
    """

    summary = "sink tokens + recent window"
    paper = "https://arxiv.org/abs/2309.17453"
    positional = True
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

    def select(self, call: AttentionCall) -> Selection | None:
        c = self.config
        pattern = SinkWindow(c.sink, c.window)
        asking = call.asking(c.question_tokens)
        if call.Lk <= c.sink + c.window or asking >= call.Lq:
            return None
        return Rows([(call.Lq - asking, pattern), (call.Lq, Causal())]) if asking else pattern
