"""Every path of the torch executor against the dense float32 reference."""

import pytest
import torch
from helpers import NAMES, check, inputs, layout_of, selections

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
