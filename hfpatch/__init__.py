"""hfpatch: inference-time attention patching for Transformers models, exactly reversible."""

from . import moved as _moved
from .version import __version__ as __version__

_moved.install()
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .public import *  # noqa: F403


def __getattr__(name: str) -> "Any":
    """Names of `hfpatch.public`, and our modules. They bring torch along, so that the command can begin without."""
    from importlib import import_module
    from importlib.util import find_spec

    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.isidentifier() and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    found = globals()[name] = getattr(import_module(f"{__name__}.public"), name)
    return found


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]
