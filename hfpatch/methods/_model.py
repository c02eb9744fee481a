"""What methods ask of a model before they patch it."""

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """The config of the model's text decoder; an empty object for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def query_heads(model: nn.Module) -> int | None:
    """Query heads of a layer as the config has them, or None."""
    return getattr(text_config(model), "num_attention_heads", None)
