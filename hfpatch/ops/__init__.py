"""Attention executors: `attend` runs a selection and returns the output with its log-sum-exp."""

from hfpatch.ops import flash_executor, flex_executor, reference, torch_decode, torch_executor, triton_executor
from hfpatch.ops.call import Attended, Problem
from hfpatch.ops.executors import (
    Executor,
    Rule,
    attend,
    attend_out,
    list_executors,
    reference_of,
    register_executor,
    watched,
)
from hfpatch.ops.merge import merge

register_executor(Executor("reference", reference.supports, reference.run, "dense float32, the definition"))
register_executor(
    Executor("torch", torch_executor.supports, torch_executor.run, "block-sparse, any device", torch_decode.one_query)
)
register_executor(Executor("triton", triton_executor.supports, triton_executor.run, "block-sparse, one fused kernel"))
register_executor(Executor("flash", flash_executor.supports, flash_executor.run, "dense and windows by flash-attn"))
register_executor(Executor("flex", flex_executor.supports, flex_executor.run, "compiled flex_attention"))

__all__ = [
    "Attended", "Executor", "Problem", "Rule", "attend", "attend_out", "list_executors", "merge", "reference_of",
    "register_executor", "watched",
]  # fmt: skip
