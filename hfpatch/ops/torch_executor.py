"""The torch executor: sparse attention on any device, never holding a tensor of `Lq * Lk` elements."""

from torch import Tensor

from hfpatch.core.selection import BlockMap, Causal, Rows, SinkWindow
from hfpatch.ops import torch_blocks, torch_causal, torch_masked, torch_window
from hfpatch.ops.call import Problem
from hfpatch.ops.torch_kernel import Kernel
from hfpatch.ops.torch_output import Output


def supports(problem: Problem) -> str | None:
    """The torch executor runs everything the reference does."""
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor]:
    """`out [B, Lq, Hq, Dv]` and `lse [B, Hq, Lq]`."""
    kernel = Kernel.of(problem)
    done = torch_causal.one_query(problem, kernel)
    if done is not None:
        return done
    out = Output.of(problem)
    _write(problem, out, kernel)
    return out.out, out.lse


def _write(problem: Problem, out: Output, kernel: Kernel) -> None:
    sel = problem.selection
    if isinstance(sel, Rows):
        for start, stop, part in sel.ranges(problem.at):
            _write(problem.rows(start, stop, part), out.rows(start, stop), kernel)
    elif isinstance(sel, Causal):
        torch_causal.run(problem, out, kernel)
    elif isinstance(sel, SinkWindow):
        torch_window.run(problem, out, kernel)
    elif isinstance(sel, BlockMap):
        torch_blocks.run(problem, out, kernel)
    else:
        torch_masked.run(problem, out, kernel)
