"""What is particular about a model's attention, read from its configuration and from the calls it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from .record import Call
from .shrink import read

_LABELS = ("sliding", "chunked", "compressed", "indexed", "sparse", "linear", "conv", "hybrid")


def kinds(model: PreTrainedModel, calls: Sequence[Call]) -> list[str]:
    """Words for the table: layer kinds, caps, sinks, latent keys, and who calls whom how often."""
    config: Any = model.config.get_text_config(decoder=True)
    labels = " ".join(map(str, read(config, "layer_types", None) or ()))
    found = [label for label in _LABELS if label in labels]
    if "sliding" not in found and any(call.keywords.get("sliding_window") for call in calls):
        found.append("sliding")
    if read(config, "kv_lora_rank", None):
        found.append("MLA")
    elif any(k[-1] != v[-1] for _, k, v in (call.shapes for call in calls)):
        found.append("values of another width")
    for word, names in (
        ("softcap", ("softcap",)),
        ("sinks", ("s_aux", "sinks")),
        ("position bias", ("position_bias",)),
    ):
        if any(call.keywords.get(name) is not None for call in calls for name in names):
            found.append(word)
    if read(config, "num_kv_shared_layers", None):
        found.append("shared keys")
    if len(calls) > len({call.module for call in calls}):
        found.append("modules called several times")
    return found
