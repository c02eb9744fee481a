"""Every path of the torch executor against the dense float32 reference."""

import pytest
import torch
from helpers import NAMES, check, inputs, layout_of, selections

from hfpatch.ops.merge import merge, mix

SHAPES = {
    "B1-H2_2-L63": (1, 2, 2, 63, 63),
    "B1-H4_1-L257": (1, 4, 1, 257, 257),
    "B3-H8_2-L111": (3, 8, 2, 111, 111),
    "B1-H8_1-L111": (1, 8, 1, 111, 111),
    "B3-H4_2-chunk50of161": (3, 4, 2, 50, 161),
    "B1-H8_2-chunk111of257": (1, 8, 2, 111, 257),
    "B3-H8_2-decode111": (3, 8, 2, 1, 111),
    "B1-H4_4-decode257": (1, 4, 4, 1, 257),
    "B2-H4_2-L1": (2, 4, 2, 1, 1),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape, name):
    q, k, v = inputs(*SHAPES[shape])
    check(q, k, v, selections(layout_of(q, k))[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["B3-H8_2-L111", "B1-H8_2-chunk111of257", "B3-H8_2-decode111"])
@pytest.mark.parametrize("extra", ["softcap", "sinks", "bias", "bias_head", "dv", "all"])
def test_extras(shape, name, extra):
    b, hq, hkv, lq, lk = SHAPES[shape]
    q, k, v = inputs(b, hq, hkv, lq, lk, dv=48 if extra in ("dv", "all") else None)
    kw = {}
    if extra in ("softcap", "all"):
        kw["softcap"] = 1.5
    if extra in ("sinks", "all"):
        kw["sinks"] = torch.randn(hq) * 2
    if extra == "bias":
        kw["bias"] = torch.randn(1, 1, lk)
    if extra in ("bias_head", "all"):
        kw["bias"] = torch.randn(b, hq, lk)
    check(q, k, v, selections(layout_of(q, k))[name], **kw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_other_dtypes(name, dtype, bias):
    for shape in ("B3-H8_2-L111", "B1-H8_2-chunk111of257", "B3-H8_2-decode111"):
        q, k, v = inputs(*SHAPES[shape], dtype=dtype)
        more = {"bias": torch.randn(1, 1, k.shape[2])} if bias else {}
        check(q, k, v, selections(layout_of(q, k))[name], sinks=torch.randn(8), **more)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["contiguous", "static", "fused", "columns"])
def test_strides(name, layout):
    for shape in ("B3-H8_2-L111", "B3-H8_2-decode111"):
        q, k, v = inputs(*SHAPES[shape], layout=layout)
        check(q, k, v, selections(layout_of(q, k))[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_parts_are_mixed_as_any_number_is_merged(dtype):
    a, b = torch.randn(2, 3, 6, 8).to(dtype)[:2], torch.randn(2, 3, 6, 8).to(dtype)[:2]
    inf = torch.inf
    lse_a = torch.tensor([0.0, -inf, 3.0, -inf, 100.0, -100.0]).expand(2, 3, 6)
    lse_b = torch.tensor([1.0, 2.0, -inf, -inf, -100.0, 100.0]).expand(2, 3, 6)
    parts = [(o.masked_fill(lse.isinf()[..., None], 0), lse) for o, lse in ((a, lse_a), (b, lse_b))]
    want, got = merge(parts), mix(*parts)
    assert got[0].dtype == dtype
    near = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got[0], want[0].to(dtype), rtol=near, atol=near)
    torch.testing.assert_close(got[1], want[1])
