"""Dense attention through hfpatch: the identity, and the yardstick for its overhead."""

from dataclasses import dataclass
from typing import ClassVar

from ..config.method_config import MethodConfig
from ..config.registry import register_method
from ..core.method import Method


@dataclass(kw_only=True)
class DenseConfig(MethodConfig):
    """No settings of its own."""

    method: ClassVar[str] = "dense"


@register_method
class Dense(Method[DenseConfig]):
    """Runs the attention implementation the model had."""

    kinds = frozenset({"full", "sliding", "chunked"})
    summary = "the model's own attention, counted"
