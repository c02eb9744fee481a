"""One tiny random model: its special ids, how it is built, and weights that make its layers matter."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

VOCAB = 101
WINDOW = 16
PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END = range(7)
FIRST_PLAIN_ID = 8
TOKENS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


@dataclass(frozen=True)
class TinyModel:
    """One architecture of the zoo: how to build it and the facts tests rely on.

    gqa: query heads per key head as the attention function sees them.
    full_layers: decoder layers with softmax attention over all keys.
    asymmetric: key and value head dimensions differ.
    learned_positions: left-padded forwards need position_ids.
    padding_exact, cached_exact: unpatched padded rows and cached decoding agree to 1e-5.
    """

    name: str
    model_cls: str
    config_cls: str
    config: dict[str, Any] = field(repr=False)
    gqa: int = 2
    full_layers: list[int] = field(default_factory=lambda: [0, 1, 2])
    sliding: bool = False
    all_sliding: bool = False
    hybrid: bool = False
    softcap: bool = False
    sinks: bool = False
    vision: bool = False
    asymmetric: bool = False
    learned_positions: bool = False
    padding_exact: bool = True
    cached_exact: bool = True
    since: tuple[int, int] = (5, 0)
    notes: str = ""

    def build(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """Return a new float32 model in eval mode; equal arguments give equal weights."""
        config = getattr(transformers, self.config_cls)(**copy.deepcopy({**self.config, **overrides}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model_cls)(config).float().eval()
            randomize(model)
        model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
        return model


def fan_in(module: nn.Module, weight: Tensor) -> int:
    """Number of inputs summed by one output of a weight with two or more dimensions."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return weight[0].numel()
    return min(weight.shape[-2:])


@torch.no_grad()
def randomize(model: nn.Module, gain: float = 1.3) -> None:
    """Redraw matrices with a sizeable scale and perturb vectors around their defaults.

    Recurrent decays (A_log) are drawn slow: summed over padding, fast ones cost float32 digits.
    """
    seen: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen:
                continue
            seen.add(id(weight))
            if name == "sinks":
                weight.normal_(0.5, 1.0)
            elif name == "A_log":
                weight.uniform_(-5.0, -2.0)
            elif weight.dim() < 2:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif isinstance(module, nn.Embedding):
                weight.normal_(0.0, 1.0)
            else:
                weight.normal_(0.0, gain / math.sqrt(fan_in(module, weight)))
