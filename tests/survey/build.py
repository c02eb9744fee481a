"""A tiny random model of any type Transformers knows, and prompts for it."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from zoo_model import randomize

from .shrink import SPECIAL, shrink
from .sizes import VOCAB

CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VISION: dict[str, str] = {
    name: cls for name, cls in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if name not in CAUSAL
}
FIRST_PLAIN_ID = 48


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model of that type in eval mode with random weights. Raises whatever its classes raise."""
    cls: Any = getattr(transformers, CAUSAL.get(name) or VISION[name])
    whole: Any = CONFIG_MAPPING[name]()
    parts = [part for part in vars(whole).values() if isinstance(part, PreTrainedConfig)]
    own = next((part for part in parts if type(part) is cls.config_class), whole)
    config: Any = shrink(own, iter(range(len(SPECIAL), FIRST_PLAIN_ID)))
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "is_decoder"):
            part.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).float().eval()
        randomize(model)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def prompt(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[batch, length]` without special ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_PLAIN_ID, VOCAB, (batch, length), generator=generator)
