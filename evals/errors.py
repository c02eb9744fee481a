"""What evaluation raises; each message says what to do."""

from hfpatch.errors import EvaluationError as EvaluationError
from hfpatch.errors import FileError as FileError


class ModelNotFoundError(EvaluationError):
    """MODEL is neither a folder, a Hub id nor `embedded`."""


class ExecutorMismatchError(EvaluationError):
    """An executor gives other numbers than the reference on this machine."""
