"""What evaluation raises; each message says what to do."""

from hfpatch.errors import HfpatchError


class EvaluationError(HfpatchError):
    """An evaluation that cannot be run as asked."""


class FileError(EvaluationError):
    """A file that says something it should not; the message starts with file and line."""


class ModelNotFoundError(EvaluationError):
    """MODEL is neither a folder, a Hub id nor `embedded`."""


class ExecutorMismatchError(EvaluationError):
    """An executor gives other numbers than the reference on this machine."""
