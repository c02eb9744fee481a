"""Choosing layers by number, list or slice text."""

import re

from ..errors import ConfigError
from ..values import shown

_PART = re.compile(r"(-?[0-9]{1,9})(?:(-)(-?[0-9]{1,9})?)?")


def parse_layers(spec: int | str | list[int] | None, num_layers: int) -> list[int]:
    """Layer numbers in `0..num_layers-1` named by `spec`; negative numbers count from the end.

    Raises ConfigError for text that cannot be read and numbers the model does not have.
    """
    if spec is None:
        return list(range(num_layers))
    if isinstance(spec, int):
        return [_resolve(spec, num_layers)]
    if isinstance(spec, (list, tuple)):
        return sorted({_resolve(n, num_layers) for n in spec})
    chosen: set[int] = set()
    for part in spec.replace(" ", "").split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigError(f"layers={shown(spec)} cannot be read; write for example '2-', '0-3,8' or '-4-'.")
        start = _resolve(int(match[1]), num_layers)
        stop = start
        if match[2]:
            stop = num_layers - 1 if match[3] is None else _resolve(int(match[3]), num_layers)
        if stop < start:
            raise ConfigError(f"layers={shown(spec)} runs backwards in {part!r}; the model has {num_layers} layers.")
        chosen.update(range(start, stop + 1))
    return sorted(chosen)


def _resolve(n: int, num_layers: int) -> int:
    if not -num_layers <= n < num_layers:
        raise ConfigError(f"layers: there is no layer {n}; the model has {num_layers} layers (0 to {num_layers - 1}).")
    return n % num_layers
