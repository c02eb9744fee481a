"""Method settings as validated dataclasses."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from transformers.utils import logging

from .errors import ConfigError

T = TypeVar("T")
logger = logging.get_logger(__name__)


def option(
    default: T,
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> T:
    """A documented setting with its range; checked whenever a config is made."""
    meta = {"help": help, "ge": ge, "gt": gt, "le": le, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if origin in (list, tuple):
        inner = [a for a in typing.get_args(hint) if a is not Ellipsis]
        return isinstance(value, (list, tuple)) and all(any(_fits(v, h) for h in inner) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is type(None) if value is None else isinstance(value, hint)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


@dataclass(kw_only=True)
class MethodConfig:
    """Settings every method has; a method adds its own fields with `option(...)`.

    Raises ConfigError naming the field, the value and what is allowed.
    """

    method: ClassVar[str] = ""
    layers: int | str | list[int] | None = option(
        None, "decoder layers to patch: a number, a list, or text such as '2-', '0-3,8', '-4-'; all when None"
    )
    executor: str | None = option(None, "attention executor to use; chosen by device and selection when None")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            self._check(f, getattr(self, f.name), hints[f.name])
        self.validate()

    def validate(self) -> None:
        """Checks that involve several fields; raise ConfigError."""

    def _check(self, f: "dataclasses.Field[Any]", value: Any, hint: Any) -> None:
        where = f"{self.method or type(self).__name__}: {f.name}={value!r}"
        if not _fits(value, hint):
            raise ConfigError(f"{where} has the wrong type; it takes {_type_name(hint)}.")
        meta = f.metadata
        if meta.get("choices") and value not in meta["choices"]:
            raise ConfigError(f"{where} is not one of {', '.join(map(repr, meta['choices']))}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            for key, ok, sign in (
                ("ge", lambda a, b: a >= b, ">="),
                ("gt", lambda a, b: a > b, ">"),
                ("le", lambda a, b: a <= b, "<="),
            ):
                bound = meta.get(key)
                if bound is not None and not ok(value, bound):
                    raise ConfigError(f"{where} is out of range; it must be {sign} {bound}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the method's name and every field."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, newer: bool = False) -> "MethodConfig":
        """Config from plain data; unknown keys raise, or are dropped with a warning when the file is `newer`."""
        known = {f.name for f in dataclasses.fields(cls)}
        data = {k: v for k, v in data.items() if k != "method"}
        unknown = sorted(set(data) - known)
        if unknown and newer:
            logger.warning("%s: settings from a newer hfpatch are ignored: %s", cls.method, ", ".join(unknown))
        elif unknown:
            raise ConfigError(
                f"{cls.method}: there is no setting {unknown[0]!r}; settings are {', '.join(sorted(known))}."
            )
        return cls(**{k: v for k, v in data.items() if k in known})
