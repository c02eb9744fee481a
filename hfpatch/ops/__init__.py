"""Attention executors: `attend` runs a selection and returns the output with its log-sum-exp."""

from hfpatch.ops import reference, torch_executor
from hfpatch.ops.call import Attended, Problem
from hfpatch.ops.executors import Executor, attend, list_executors, register_executor
from hfpatch.ops.merge import merge

register_executor(Executor("reference", reference.supports, reference.run, "dense float32, the definition"))
register_executor(Executor("torch", torch_executor.supports, torch_executor.run, "block-sparse, any device"))

__all__ = ["Attended", "Executor", "Problem", "attend", "list_executors", "merge", "register_executor"]
