"""What `import hfpatch` offers; loaded when the first of these names is asked for."""

from .api import Patch, get_patch, patch_model, patched, unpatch_model
from .config.method_config import MethodConfig, option
from .config.patch_config import PatchConfig
from .config.registry import get_method, list_methods, register_method
from .core.block_selector import BlockConfig, BlockSelector
from .core.call import AttentionCall
from .core.method import Method
from .core.report import Report
from .core.reweight import Columns
from .core.selection import BlockMap, Causal, Predicate, Rows, Selection, SinkWindow
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
from .version import __version__

__all__ = [
    "AlreadyPatchedError",
    "AttentionCall",
    "BlockConfig",
    "BlockMap",
    "BlockSelector",
    "CacheError",
    "Causal",
    "Columns",
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
    "Predicate",
    "Report",
    "Rows",
    "SaveError",
    "Selection",
    "SinkWindow",
    "UnknownMethodError",
    "UnsupportedModelError",
    "__version__",
    "get_method",
    "get_patch",
    "list_methods",
    "option",
    "patch_model",
    "patched",
    "register_method",
    "unpatch_model",
]
