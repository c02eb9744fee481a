"""What methods ask of a model before they patch it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention_source import attention_source


def text_config(model: nn.Module) -> Any:
    """The config of the model's text decoder; an empty object for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def query_heads(model: nn.Module) -> int | None:
    """Query heads of a layer as the config has them, or None."""
    return getattr(text_config(model), "num_attention_heads", None)


def modeling_names(model: nn.Module) -> dict[str, Any]:
    """The names of the file that defines the text decoder's attention; none for a module without one."""
    get_decoder: Any = getattr(model, "get_decoder", lambda: model)
    found = (attention_source(m) for m in get_decoder().modules() if not isinstance(m, PreTrainedModel))
    return next((f.scope for f in found if f is not None), {})
