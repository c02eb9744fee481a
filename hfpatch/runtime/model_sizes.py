"""The sizes of a model by which learned tensors are measured, and that measuring."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.learned import Learned, ModelSizes, check_tensors
from .model_facts import text_config
from .survey import survey


def model_sizes(model: nn.Module) -> ModelSizes:
    """The sizes of a model's text decoder. Raises UnsupportedModelError."""
    config = text_config(model)

    def known(*names: str) -> int | None:
        found = (getattr(config, name, None) for name in names)
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    heads, hidden = known("num_attention_heads"), known("hidden_size")
    head = known("head_dim") or (hidden // heads if hidden and heads else None)
    latent = [known("qk_nope_head_dim"), known("qk_rope_head_dim")]
    query = known("qk_head_dim") or (sum(n or 0 for n in latent) if any(latent) else head)
    dtype: Any = getattr(model, "dtype", torch.float32)
    return ModelSizes(
        survey(model).num_layers, heads, query, known("v_head_dim") or head,
        known("attention_hidden_size") or hidden, dtype if dtype.is_floating_point else torch.float32,
    )  # fmt: skip


class Taker(Protocol):
    """A method, as far as its tensors go."""

    given: Mapping[str, Tensor]

    @property
    def name(self) -> str: ...

    def learns(self, sizes: ModelSizes) -> Mapping[str, Learned] | None: ...


def check_given(methods: Sequence[Taker], model: nn.Module) -> None:
    """Raise ConfigError at the first tensor that its method does not take or that does not fit the model."""
    for method in methods:
        if method.given:
            sizes = model_sizes(model)
            check_tensors(method.name, method.given, method.learns(sizes), sizes.dtype)
