"""`pattern`: every rule against its plain-loop definition."""

import pytest
import torch
from method_calls import DECODES, SHAPES, check_executors, chosen_mask, make_call, make_method
from oracles import pattern

from hfpatch.core.selection import Layout

RULES = {
    "sliding": (dict(window_blocks=3, sink_blocks=1), lambda h, i, j: i - j < 3 or j < 1),
    "slash": (
        dict(window_blocks=2, sink_blocks=1, stride=3, slashes=2),
        lambda h, i, j: i - j < 2 or j < 1 or i - j in (3, 6),
    ),
    "dilated": (dict(stride=2, count=4), lambda h, i, j: i - j in (0, 2, 4, 6)),
    "power": (
        dict(window_blocks=3, sink_blocks=1),
        lambda h, i, j: i - j < 3 or j < 1 or i - j in (1, 2, 4, 8, 16, 32),
    ),
}


@pytest.mark.parametrize("shape", {**SHAPES, **DECODES})
@pytest.mark.parametrize("name", RULES)
def test_equals_the_rule(shape, name):
    call = make_call({**SHAPES, **DECODES}[shape], dv=24)
    settings, rule = RULES[name]
    method = make_method("pattern", pattern=name, block=8, **settings)
    assert torch.equal(chosen_mask(method, call), pattern(call, 8, 1, rule))
    check_executors(method, call)


@pytest.mark.parametrize("shape", {**SHAPES, **DECODES})
@pytest.mark.parametrize("share", ["group", "head", "all"])
def test_s2_shards_heads(shape, share):
    call = make_call({**SHAPES, **DECODES}[shape])
    heads = {"group": call.Hkv, "head": call.Hq, "all": 1}[share]
    step = max(1, 4 // heads)
    method = make_method("pattern", pattern="s2", block=8, window_blocks=2, stride=4, head_sharing=share)
    want = pattern(call, 8, heads, lambda h, i, j: i - j < 2 or (j + h * step + 1) % 4 == 0)
    assert torch.equal(chosen_mask(method, call), want)
    check_executors(method, call)


def test_power_counts_of_the_paper():
    method = make_method("pattern", pattern="power")
    at = Layout(1, 1, 1, 128 * 256, 128 * 256, torch.device("cpu"))
    blocks = method._part(at, 0, at.Lq).block_mask(at)[0, 0]
    assert int(blocks[127].sum()) == 10
    assert abs(float(blocks.sum()) / (128 * 129 / 2) - 0.138) < 5e-4


def test_few_shards_are_told():
    class Config:
        num_attention_heads, num_key_value_heads = 8, 2

    class Model:
        config = Config()

    method = make_method("pattern", pattern="s2")
    method.prepare(Model(), [0])
    assert "2/8" in method.notes()[0]
