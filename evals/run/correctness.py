"""Executors against the reference, on the very calls a benchmark is about to time."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfpatch.ops import Problem, reference_of, watched

from ..errors import ExecutorMismatchError
from .models import Loaded
from .variants import Variant

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
REFERENCE_BYTES = 2**30


@dataclass
class Check:
    """Calls compared, the largest error relative to the largest reference value, and the calls too big to compare."""

    variant: str
    calls: int = 0
    too_big: int = 0
    error: float = 0.0
    tolerance: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for results.json."""
        return {"calls": self.calls, "too_big": self.too_big, "error": self.error, "tolerance": self.tolerance}


def verified(check: Check) -> AbstractContextManager[None]:
    """Every executor call inside the block is run by `reference` too. Raises ExecutorMismatchError."""

    def compare(problem: Problem, out: Tensor, executor: str) -> None:
        at = problem.at
        if at.B * at.Hq * at.Lq * at.Lk * 4 > REFERENCE_BYTES:
            check.too_big += 1
        else:
            _compare(check, out, executor, reference_of(problem)[0])

    return watched(compare)


def _compare(check: Check, out: Tensor, executor: str, want: Tensor) -> None:
    check.tolerance = TOLERANCE.get(out.dtype, 1e-4)
    scale = want.float().abs().max().clamp(min=1e-9)
    error = float((out.float() - want.float()).abs().max() / scale)
    check.calls += 1
    check.error = max(check.error, error)
    if not error <= check.tolerance:
        raise ExecutorMismatchError(
            f"Nothing is reported for {check.variant}: on this machine executor {executor!r} differs from the "
            f"reference by {error:.1e} (at most {check.tolerance:.0e} is accepted) for an output {list(out.shape)} in "
            f"{str(out.dtype).removeprefix('torch.')}; name another with --set executor=..."
        )


def check_variant(loaded: Loaded, variant: Variant, ids: Tensor, *, prefill: int = 2048) -> Check:
    """Compare a variant's calls for prompt `ids [1, L]`: a prefill of at most `prefill` tokens, and decode steps at L.

    Raises ExecutorMismatchError.
    """
    from .generation import generate_tokens

    check = Check(variant.name)
    with variant.applied(loaded.model), verified(check):
        for prompt in {min(prefill, ids.shape[1]), ids.shape[1]}:
            generate_tokens(loaded, ids[:, :prompt], 3)
    return check
