"""All that part 1 of `benchmarks/gpu.py` asks of the triton executor, at sizes of Triton's interpreter."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")

for folder in ("benchmarks", "benchmarks/ops"):
    sys.path.append(str(Path(__file__).resolve().parents[2] / folder))

problems: Any = import_module("gpu_parts.problems")
checks: Any = import_module("gpu_parts.exact")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: part 1 itself runs there")
BLOCK = {"blocks128": 128, "blocks64": 64, "per head": 64, "rows": 64}


def small(spec: Any) -> Any:
    """The problem with a few blocks of keys, the last of them cut; the same kind, widths, groups, dtype and layout."""
    heads = 2 if spec.kind == "per head" else 1
    lk = BLOCK.get(spec.kind, 16) + 37
    lq = lk if spec.lq == spec.lk else min(spec.lq, 17)
    return replace(spec, hq=heads * spec.hq // spec.hkv, hkv=heads, lq=lq, lk=lk)


FOUND = [*problems._bases(), *problems._sizes(), *problems._decodes(), *problems._dtypes(), *problems._longs()]
SPECS = list(dict.fromkeys(small(spec) for spec in FOUND))


@pytest.mark.thin(4)
@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_right_in_float64_written_and_the_same_again(spec: Any) -> None:
    p = spec.make(torch.device("cpu"))
    found = checks.judge(p, "triton", checks.exact(p), None, repeats=2)
    assert found["status"] == "ok", found


def test_everything_is_there() -> None:
    """Part 1 lost none of what it is to check."""
    assert {s.kind for s in SPECS} == set(problems.KINDS)
    assert {(s.d, s.dv) for s in SPECS} == {(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)}
    assert {s.hq // s.hkv for s in SPECS} >= {1, 4, 7} and {1, 17} < {s.lq for s in SPECS}
    assert {s.dtype for s in SPECS} == {torch.bfloat16, torch.float16, torch.float32}
    assert {e for s in SPECS for e in s.extras} == {"sinks", "softcap", "bias"}
    assert {s.layout for s in SPECS} == {"transposed", "fused", "static"}
