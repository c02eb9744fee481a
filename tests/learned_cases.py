"""Learned tensors of every method for the zoo's Llama: ones that fit it, and ones of another model or form."""

from typing import Any

import torch
from torch import Tensor

from hfpatch.methods.dhsa.predictor import BoundaryPredictor
from hfpatch.methods.flux.router import Routers

LAYERS, HEADS, WIDE, HIDDEN = 3, 8, 128, 64  # of the zoo's Llama
SPARSE = {"sparse_settings": {"sink": 2, "window": 8}}
DHSA = {
    "boundaries": "predictor",
    "budget": 40,
    "sink": 2,
    "local": 4,
    "block_q": 4,
    "window": 2,
    "question_tokens": 0,
}


def predictor(**changes: Any) -> dict[str, Tensor]:
    own = BoundaryPredictor(32, width=8, heads=2, hidden=8).tensors()
    changes = {f"predictor.{k.replace('__', '.')}": v for k, v in changes.items()}
    return {k: t for k, t in {**own, **changes}.items() if t is not None}


def sizes(*numbers: Any, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    return predictor(sizes=torch.tensor(numbers, dtype=dtype))


def routers(dim: int = 16, layers: int = LAYERS) -> dict[str, Tensor]:
    return dict(Routers(range(layers), dim).state_dict())


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if k not in names}


def gates(weight: Any = None, bias: Any = None, constant: Any = None) -> dict[str, Any]:
    given = {"weight": weight, "bias": bias, "constant": constant}
    return {f"layers.0.{k}": t for k, t in given.items() if t is not None}


VS = {"min_length": 0, "block_q": 8, "block_k": 4}
FITTING: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "gates per head": ("gated", {}, gates(torch.randn(HEADS, HIDDEN))),
    "gates per channel": ("gated", {"form": "sigmoid"}, gates(torch.randn(WIDE, HIDDEN), torch.randn(WIDE))),
    "gates in half": ("gated", {}, gates(torch.randn(HEADS, HIDDEN).half())),
    "constants": ("gated", {"form": "constant"}, gates(constant=torch.rand(HEADS))),
    "gamma": ("zerotuning", {}, {"gamma": torch.rand(HEADS) + 1}),
    "gamma by layer": ("zerotuning", {}, {"gamma": torch.rand(LAYERS, HEADS).double() + 1}),
    "scale": ("head_scale", {}, {"scale": torch.randn(LAYERS, HEADS)}),
    "budgets": ("vertical_slash", VS, {"per_head": torch.randint(1, 9, (LAYERS, HEADS, 2), dtype=torch.int32)}),
    "ranking": ("flux", {"router": "entropy", **SPARSE}, {"ranking": torch.rand(LAYERS)}),
    "routers": ("flux", {"router": "learned", **SPARSE}, routers()),
    "routers in bfloat16": ("flux", {"router": "learned", **SPARSE}, {k: t.bfloat16() for k, t in routers().items()}),
    "predictor": ("dhsa", DHSA, predictor()),
    "predictor in half": ("dhsa", DHSA, {k: t.half() if t.is_floating_point() else t for k, t in predictor().items()}),
}


W = torch.zeros(HEADS, HIDDEN)
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "another width": ("gated", {}, gates(torch.zeros(HEADS, HIDDEN + 1)), "layers.0.weight is float32"),
    "another number of gates": ("gated", {}, gates(torch.zeros(3 * HEADS, HIDDEN)), r"\[8, 64\] or \[128, 64\]"),
    "bias alone": ("gated", {}, gates(bias=torch.ones(HEADS)), "layers.0.bias needs layers.0.weight"),
    "bias of another form": ("gated", {}, gates(W, torch.ones(WIDE)), r"layers.0.bias is float32 \[128\]"),
    "weights for constants": ("gated", {"form": "constant"}, gates(W), "does not belong"),
    "constants for weights": ("gated", {}, gates(constant=torch.ones(HEADS)), "does not belong"),
    "a layer too many": ("gated", {}, {"layers.3.weight": W}, "does not belong"),
    "a layer of 5000 digits": ("gated", {}, {f"layers.{'9' * 5000}.weight": W}, "does not belong"),
    "a layer written twice": ("gated", {}, {"layers.00.weight": W}, "does not belong"),
    "too large for half": ("gated", {}, gates(torch.full((HEADS, HIDDEN), 2e6)), "between"),
    "gamma too small": ("zerotuning", {}, {"gamma": torch.full((HEADS,), 1e-4)}, "between 0.001"),
    "gamma negative": ("zerotuning", {}, {"gamma": -torch.ones(HEADS)}, "between 0.001"),
    "gamma whole": ("zerotuning", {}, {"gamma": torch.ones(HEADS, dtype=torch.long)}, "floating-point"),
    "gamma misspelt": ("zerotuning", {}, {"gama": torch.ones(HEADS)}, r"'gama' does not belong .* takes gamma"),
    "gamma deeper": ("zerotuning", {}, {"gamma.x": torch.ones(HEADS)}, "does not belong"),
    "gamma of a method that learns nothing": ("streaming", {}, {"gamma": torch.ones(HEADS)}, "takes none"),
    "scale too large": ("head_scale", {}, {"scale": torch.full((LAYERS, HEADS), 1e5)}, "between"),
    "budgets negative": ("vertical_slash", VS, {"per_head": -torch.ones(LAYERS, HEADS, 2).long()}, "between 0"),
    "budgets not whole": ("vertical_slash", VS, {"per_head": torch.ones(LAYERS, HEADS, 2)}, "whole numbers"),
    "budgets too large": ("vertical_slash", VS, {"per_head": torch.full((LAYERS, HEADS, 2), 2**40)}, "between 0"),
    "routers of another width": ("flux", {"router": "learned"}, routers(9), "layer.0.encoder.0.weight is float32"),
    "a router in part": ("flux", {"router": "learned"}, without(routers(), "layer.1.head.4.bias"), "needs layer.1"),
    "a router too many": ("flux", {"router": "learned"}, routers(layers=4), "does not belong"),
    "sizes too few": ("dhsa", DHSA, sizes(32, 4), r"predictor.sizes is int64 \[2\]"),
    "sizes not whole": ("dhsa", DHSA, sizes(32, 4, 8, 2, 8, dtype=torch.float32), "whole numbers"),
    "sizes negative": ("dhsa", DHSA, sizes(-32, 4, 8, 2, 8), "between 0"),
    "sizes zero": ("dhsa", DHSA, sizes(0, 0, 0, 0, 0), "predictor.sizes holds"),
    "no heads": ("dhsa", DHSA, sizes(32, 4, 8, 0, 8), "predictor.sizes holds"),
    "heads negative": ("dhsa", DHSA, sizes(32, 4, 8, -2, 8), "between 0"),
    "heads that do not divide": ("dhsa", DHSA, sizes(32, 4, 8, 3, 8), "predictor.sizes holds"),
    "no window": ("dhsa", DHSA, sizes(32, 0, 8, 2, 8), "predictor.sizes holds"),
    "a window of 2^40": ("dhsa", DHSA, sizes(32, 2**40, 8, 2, 8), "between 0"),
    "channels of 2^40": ("dhsa", DHSA, sizes(2**40, 4, 8, 2, 8), "between 0"),
    "hidden of 2^40": ("dhsa", DHSA, sizes(32, 4, 8, 2, 2**40), "between 0"),
    "hidden of 2^16": ("dhsa", DHSA, sizes(32, 4, 8, 2, 2**16), "predictor.mlp.0.weight is float32"),
    "sizes missing": ("dhsa", DHSA, without(predictor(), "predictor.sizes"), "does not belong"),
    "a weight missing": ("dhsa", DHSA, without(predictor(), "predictor.norm.weight"), "needs predictor.norm.weight"),
    "a weight too many": ("dhsa", DHSA, predictor(evil=torch.ones(1)), "predictor.evil"),
    "a weight of another size": ("dhsa", DHSA, predictor(norm__weight=torch.ones(7)), "predictor.norm.weight is"),
}  # fmt: skip
