"""What a setting may hold: plain, finite data of its field's type, converted where nothing is lost."""

import math
import numbers
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

INT_END = 1 << 31
FLOAT_END = float(np.finfo(np.float32).max)
DEPTH = 16
_CONTROL = {n: f"\\x{n:02x}" for n in (*range(32), 127)}
PathText = Annotated[str, "names a file or folder"]


class Misfit(Exception):
    """A value of another type than the field's."""


class OutOfRange(Exception):
    """A number that no setting can hold; the message says what they can."""


def shown(value: Any, most: int = 80) -> str:
    """A value for a message, on one line and not too long; its type where it cannot be written."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of someone else's, or a whole number of 5000 digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown_path(path: Any) -> str:
    """A path for a message: as it is, but for characters that would break the line or cannot be printed."""
    return str(path).encode("utf-8", "backslashreplace").decode().translate(_CONTROL)[:300]


def type_name(hint: Any) -> str:
    """A field's type as people write it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def fitted(value: Any, hint: Any, depth: int = DEPTH) -> Any:
    """The value as `hint` has it: tuples become lists, numpy numbers Python's. Raises Misfit, OutOfRange."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    if depth == 0:
        raise Misfit
    if hint is Any:
        return _plain(value, depth)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(value, args, depth)
    if origin in (list, tuple) or hint in (list, tuple):
        _check(isinstance(value, (list, tuple, range)))
        inner = tuple(a for a in args if a is not Ellipsis) or (Any,)
        return (origin or hint)(_first_fit(v, inner, depth - 1) for v in value)
    if origin is dict or hint is dict:
        _check(isinstance(value, Mapping))
        of_key, of_value = args or (str, Any)
        return {fitted(k, of_key, depth - 1): fitted(v, of_value, depth - 1) for k, v in value.items()}
    if origin is Annotated:
        return fitted(value, args[0], depth)
    _check(any(value is a or value == a for a in args) if origin is typing.Literal else isinstance(value, hint))
    return value


def _first_fit(value: Any, hints: tuple[Any, ...], depth: int) -> Any:
    for hint in hints:
        try:
            return fitted(value, hint, depth)
        except Misfit:
            continue
    raise Misfit


def _plain(value: Any, depth: int) -> Any:
    """A value that JSON can hold."""
    return _first_fit(value, (types.NoneType, bool, int, float, str, list, dict), depth)


def _check(fits: bool) -> None:
    if not fits:
        raise Misfit


def _none(value: Any) -> None:
    _check(value is None)


def _bool(value: Any) -> bool:
    _check(isinstance(value, (bool, np.bool_)))
    return bool(value)


def _int(value: Any) -> int:
    _check(isinstance(value, numbers.Integral) and not isinstance(value, bool))
    if not -INT_END < value < INT_END:
        raise OutOfRange(f"whole numbers go up to {INT_END - 1}")
    return int(value)


def _float(value: Any) -> float:
    _check(isinstance(value, numbers.Real) and not isinstance(value, bool))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT_END:
        raise OutOfRange("it must be finite in float32")
    return number


def _str(value: Any) -> str:
    _check(isinstance(value, str))
    return str.__str__(value)


def _path(value: Any) -> str:
    return _str(os.fspath(value) if isinstance(value, os.PathLike) else value)


_SCALARS: dict[Any, Any] = {
    **{types.NoneType: _none, bool: _bool, int: _int, float: _float, str: _str},
    PathText: _path,
}
