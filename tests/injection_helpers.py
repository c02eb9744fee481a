"""What the tests of patching share: one sparse patch, and a model of one's own to put it on."""

from typing import Any

import zoo
from transformers import PreTrainedModel

SPARSE: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}


def fresh(name: str = "llama", **overrides: Any) -> PreTrainedModel:
    return zoo.SUPPORTED[name].build(**overrides)
