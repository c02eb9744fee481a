"""A model's own rotary embedding, applied at positions of our choice."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .model_facts import modeling_names, text_config

_MOVING = ("dynamic", "longrope")  # their frequencies follow the longest position asked for

_TAKES = ["q", "k", "cos", "sin"]


class Rotation:
    """Turns vectors `[B, H, L, D]` as the model turns queries; by the mean turn over some positions, too."""

    def __init__(self, rotary: nn.Module, apply: Any) -> None:
        self._rotary, self._apply = rotary, apply
        self._kind = ("full_attention",) if "layer_type" in inspect.signature(rotary.forward).parameters else ()

    @classmethod
    def of(cls, model: Any, name: str) -> "Rotation":
        """The one rotary embedding of a model. Raises UnsupportedModelError where it is not of the plain kind."""
        apply = modeling_names(model).get("apply_rotary_pos_emb")
        found = [m for path, m in model.get_decoder().named_modules() if path.rpartition(".")[2] == "rotary_emb"]
        rope = getattr(text_config(model), "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        odd = "mrope_section" in rope or any(word in str(rope.get("rope_type")) for word in _MOVING)
        if apply is None or list(inspect.signature(apply).parameters)[:4] != _TAKES or len(found) != 1 or odd:
            raise UnsupportedModelError(
                f"{name} turns queries to later positions, and {type(model).__name__} has no plain rotary embedding "
                "to do that with; use keydiff or snapkv."
            )
        return cls(found[0], apply)

    def at(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, 1, D]`, float32, averaged over `positions [n]`."""
        parts = self._rotary(like.new_zeros(1, dtype=torch.float32), positions[None], *self._kind)
        cos, sin = (x.float().mean(1, keepdim=True) for x in parts)
        return cos, sin

    def turn(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """`x [B, H, L, D]` turned."""
        out: Tensor = self._apply(x, x, *turn)[0]
        return out
