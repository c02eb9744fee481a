"""What the tests of a patch's handle share: two patches, a model, and which of its layers carry one."""

from typing import Any

import zoo
from torch import nn
from transformers import PreTrainedModel

from hfpatch.runtime.injection import RUNTIME

STREAMING: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}
SHARED: dict[str, Any] = {
    "method": "dhsa", "layer_sharing": "selection", "budget": 24, "sink": 2, "local": 4, "block_q": 4,
    "question_tokens": 0,
}  # fmt: skip


def fresh() -> PreTrainedModel:
    return zoo.SUPPORTED["llama"].build()


def carrying(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if RUNTIME in vars(m)]
