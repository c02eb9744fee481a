"""The torch executor on a pretended GPU: which of CUDA's kernels it asks for what, and that the result is right.

What stands in for the kernels has their conventions and refuses what they refuse; none has run on a GPU.
"""

from collections import Counter

import pytest
import torch
from helpers import NAMES, RATIO, assert_close, inputs, layout_of, moved, selections
from torch.nn.attention import SDPBackend

pytest.importorskip("triton", reason="Triton is not installed (pip install 'hfpatch[triton]')")

from pretend import kernels
from pretend.modes import pretending
from pretend.tensors import OnGpu, held, log

from hfpatch.core.selection import Causal, SinkWindow
from hfpatch.ops import attend, torch_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing needs to be pretended")

PREFIX = "_scaled_dot_product_"
SHAPES = {"prefill": (2, 4, 2, 63, 63), "chunk": (2, 4, 1, 40, 111), "decode": (2, 8, 2, 1, 111)}


def ran(q, k, v, selection, **kw):
    """Compare with the reference on the CPU; the attention kernels and matrix products that ran."""
    kw = {"scale": q.shape[-1] ** -0.5, **kw}
    want = attend(q, k, v, selection=selection, executor="reference", **kw)
    log.reset()
    with pretending():
        there = {n: OnGpu(t) if isinstance(t, torch.Tensor) else t for n, t in kw.items()}
        q, k, v = (OnGpu(t) for t in (q, k, v))
        got = attend(q, k, v, selection=moved(selection, q.device), executor="torch", **there)
        out, lse = held(got.out), held(got.lse)
    assert not log.outside.faults, log.outside.faults
    assert_close("out", want.out, out, RATIO[q.dtype])
    assert_close("lse", want.lse, lse, RATIO[q.dtype])
    names = {n.removeprefix(PREFIX).removesuffix("_attention"): c for n, c in log.outside.names.items()}
    return {n: c for n, c in names.items() if n in ("flash", "cudnn", "efficient", "bmm")}


@pytest.fixture(params=["flash", "cudnn", "efficient"])
def card(request, monkeypatch):
    """What the card prefers where it can."""
    backend = int(getattr(SDPBackend, f"{request.param.upper()}_ATTENTION").value)
    assert backend == getattr(torch_cuda, request.param.upper())
    monkeypatch.setattr(kernels, "PREFERRED", [backend])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_dense_takes_one_call_for_each_stretch_of_keys(card, dtype):
    few = "flash" if card == "cudnn" else card
    for phase, shape, want in (
        ("prefill", SHAPES["prefill"], {card: 1}), ("chunk", SHAPES["chunk"], {card: 2}),
        ("decode", SHAPES["decode"], {few: 1}),
    ):  # fmt: skip
        q, k, v = inputs(*shape, dtype=dtype)
        assert ran(q, k, v, Causal()) == want, phase
        assert sum(ran(q, k, v, Causal(), sinks=torch.randn(shape[1])).values()) == sum(want.values()), phase


def test_what_flash_cannot_run_is_left_to_the_others(card):
    q, k, v = inputs(*SHAPES["chunk"], dtype=torch.float32)
    assert ran(q, k, v, Causal()) == {"efficient": 2}
    q, k, v = inputs(*SHAPES["chunk"], d=48, dv=32, dtype=torch.bfloat16)
    assert ran(q, k, v, Causal()) == {"efficient": 2}
    assert ran(*inputs(*SHAPES["decode"], dv=16, dtype=torch.bfloat16), Causal()) == {"efficient": 1}
    q, k, v = inputs(*SHAPES["chunk"], d=20, dtype=torch.bfloat16)
    assert ran(q, k, v, Causal()) == {card: 2}
    assert set(ran(q, k, v, Causal(), bias=torch.randn(2, 4, 111))) == {"efficient"}


def test_soft_caps_multiply_in_half_precision(card):
    for shape in SHAPES.values():
        found = ran(*inputs(*shape, dtype=torch.bfloat16), Causal(), softcap=1.5)
        assert set(found) == {"bmm"}, shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", SHAPES)
@pytest.mark.parametrize("extra", ["", "bias", "dv", "softcap"])
def test_every_selection_is_right(name, phase, extra):
    shape = SHAPES[phase]
    q, k, v = inputs(*shape, dv=48 if extra == "dv" else None, dtype=torch.float16)
    more = {"bias": {"bias": torch.randn(1, shape[1], shape[4])}, "softcap": {"softcap": 1.5}}.get(extra, {})
    ran(q, k, v, selections(layout_of(q, k))[name], sinks=torch.randn(shape[1]), **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase", SHAPES)
def test_every_selection_is_right_where_cudnn_is_preferred(name, phase, monkeypatch):
    monkeypatch.setattr(kernels, "PREFERRED", [torch_cuda.CUDNN])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    q, k, v = inputs(*SHAPES[phase], dtype=torch.bfloat16)
    ran(q, k, v, selections(layout_of(q, k))[name])


def test_cudnn_is_given_no_overlapping_views(monkeypatch):
    monkeypatch.setattr(kernels, "PREFERRED", [torch_cuda.CUDNN])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = ran(*inputs(1, 4, 2, 450, 450, dtype=torch.bfloat16), SinkWindow(4, 200))
    assert found["flash"] and found["cudnn"]  # the windows of blocks of queries, and the first tokens' own


def test_masks_are_aligned_before_they_are_expanded():
    mask = torch.zeros(1, 1, 30, 37)
    made = torch_cuda.aligned_mask(mask, torch.float16)
    assert made.shape == mask.shape and made.dtype == torch.float16 and made.stride(2) == 48
    assert made.expand(8, 4, 30, 37).untyped_storage().nbytes() == 30 * 48 * 2
    kept = torch.zeros(1, 1, 30, 48)
    assert torch_cuda.aligned_mask(kept, torch.float32) is kept


def test_without_the_product_to_float32_of_newer_releases(monkeypatch):
    a, b = torch.randn(2, 3, 4, 8).half(), torch.randn(2, 3, 8, 5).half()
    monkeypatch.delattr(torch.ops.aten.bmm, "dtype", raising=False)
    monkeypatch.setattr(torch.ops.aten, "bmm", Counter())
    assert_close("product", a.double() @ b.double(), torch_cuda.product(a, b), 1e-5)
