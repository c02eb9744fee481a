"""What a model consists of, to see whether a patch leaves anything behind."""

from __future__ import annotations

from typing import Any

from torch import nn


def tree(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, tensors and configs by identity, hook tables by content."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            out[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else id(value)
    return out


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names whose value is another, or that are only in one of the two."""
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
