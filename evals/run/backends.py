"""Dense attention implementations of Transformers other than the model's own, to be timed beside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import import_utils

from .models import Loaded
from .variants import DENSE, Variant


def _flash(version: int) -> Callable[[Loaded], bool]:
    def fits(loaded: Loaded) -> bool:
        installed = getattr(import_utils, f"is_flash_attn_{version}_available", lambda: False)
        return loaded.device.type == "cuda" and loaded.model.dtype.itemsize == 2 and bool(installed())

    return fits


# `eager` is left out: it holds a length x length tensor per head, and nobody would choose it for speed.
BACKENDS: dict[str, Callable[[Loaded], bool]] = {
    "sdpa": lambda loaded: True,
    "flash_attention_2": _flash(2),
    "flash_attention_3": _flash(3),
}


@dataclass(frozen=True)
class Backend(Variant):
    """The unpatched model under another dense implementation."""

    implementation: str = ""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model under this implementation inside a `with` block."""
        found: Any = model
        before = found.config._attn_implementation
        found.set_attn_implementation(self.implementation)
        try:
            yield None
        finally:
            found.set_attn_implementation(before)


def other_backends(loaded: Loaded) -> list[Variant]:
    """A variant for every dense implementation that is installed, fits the model and is not the one it uses."""
    own = loaded.model.config._attn_implementation
    found: list[Variant] = []
    for name, fits in BACKENDS.items():
        if name == own or not fits(loaded):
            continue
        variant = Backend(f"{DENSE}, {name}", None, name)
        try:
            with variant.applied(loaded.model):
                found.append(variant)
        except (ValueError, ImportError):  # the architecture or the installed kernel does not take it
            continue
    return found
