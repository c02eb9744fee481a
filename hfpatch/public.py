"""What `import hfpatch` offers; loaded when the first of these names is asked for."""

from .api import Patch, get_patch, patch_model, patched, unpatch_model
from .config import MethodConfig
from .errors import (
    AlreadyPatchedError,
    CacheError,
    ConfigError,
    ExecutorError,
    HfpatchError,
    IncompatibleMethodsError,
    NothingPatchedError,
    NotPatchedError,
    SaveError,
    UnknownMethodError,
    UnsupportedModelError,
)
from .method import Method
from .patch_config import PatchConfig
from .registry import get_method, list_methods, register_method
from .report import Report
from .version import __version__

__all__ = [
    "AlreadyPatchedError",
    "CacheError",
    "ConfigError",
    "ExecutorError",
    "HfpatchError",
    "IncompatibleMethodsError",
    "Method",
    "MethodConfig",
    "NotPatchedError",
    "NothingPatchedError",
    "Patch",
    "PatchConfig",
    "Report",
    "SaveError",
    "UnknownMethodError",
    "UnsupportedModelError",
    "__version__",
    "get_method",
    "get_patch",
    "list_methods",
    "patch_model",
    "patched",
    "register_method",
    "unpatch_model",
]
