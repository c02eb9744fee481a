"""What our executor gives: dense where a method keeps everything, the definition where it chooses."""

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from toy_methods import (
    LENGTH,
    KeepAll,
    RandomBlocks,
    RandomTokens,
    Recorder,
    Toy,
    architectures,
    executors,
    make,
    padded,
    softmax_of,
    toys,  # noqa: F401  (registers the toys around each test)
    values_of,
)

from hfpatch import patched
from hfpatch.config import registry


@architectures
@executors
def test_our_executor_equals_dense(tiny: zoo.TinyModel, executor: str) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, LENGTH)
    want = logits(model, ids)
    with patched(model, make(KeepAll, executor=executor)) as patch:
        assert_close("logits", logits(model, ids), want)
        assert all(dict(line.stats.executors) == {executor: 1} for line in patch.report().lines)
        assert patch.report().density() == 1.0


@architectures
@executors
@pytest.mark.parametrize("side", ["left", "right"])
def test_our_executor_equals_dense_with_padding(tiny: zoo.TinyModel, executor: str, side: str) -> None:
    model = built(tiny.name)
    batch, kwargs = padded(tiny, side)
    real = kwargs["attention_mask"].bool()
    want = logits(model, batch, **kwargs)
    with patched(model, make(KeepAll, executor=executor)) as patch:
        assert_close("logits", logits(model, batch, **kwargs)[real], want[real])
        assert not patch.report().fallbacks()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "olmo2"])
@executors
def test_our_executor_in_bfloat16_stays_near_float32(name: str, executor: str) -> None:
    model = zoo.SUPPORTED[name].build().bfloat16()
    with patched(model, [make(KeepAll, executor=executor), make(Recorder)]) as patch:
        logits(model, zoo.prompt(model, 2, LENGTH))
        seen = patch.methods[1].seen
    assert seen
    for call, out, _ in seen:
        assert out.dtype == call.q.dtype == torch.bfloat16
        assert_close(f"layer {call.layer}", out.float(), values_of(call, softmax_of(call)), 2e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "qwen3_next"])
@pytest.mark.parametrize("cls", [RandomBlocks, RandomTokens])
@pytest.mark.parametrize("where", ["plain", "padded", "cached"])
def test_block_maps_equal_the_definition(name: str, cls: type[Toy], where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    out = {}
    for executor in ("torch", "reference"):
        with patched(model, make(cls, executor=executor)) as patch:
            if where == "padded":
                batch, kwargs = padded(tiny)
                got = logits(model, batch, **kwargs)[kwargs["attention_mask"].bool()]
            elif where == "plain":
                got = logits(model, zoo.prompt(model, 2, LENGTH))
            else:
                ids = zoo.prompt(model, 2, LENGTH)
                with torch.no_grad():
                    cache = model(ids[:, :-2], use_cache=True).past_key_values
                    got = torch.cat([model(t, past_key_values=cache).logits for t in ids[:, -2:].split(1, 1)], 1)
            out[executor] = got
            assert patch.report().density() < 0.9 and not patch.report().fallbacks()
    assert_close("logits", out["torch"], out["reference"])


def test_selections_of_two_methods_are_intersected() -> None:
    model = built("gemma2")
    ids = zoo.prompt(model, 2, LENGTH)
    narrow = registry.make_config("streaming", {"sink": 2, "window": 6})
    out = []
    for executor in ("torch", "reference"):
        with patched(model, [make(RandomTokens, executor=executor), narrow]) as patch:
            out.append(logits(model, ids))
            density = patch.report().density()
    with patched(model, narrow) as patch:
        logits(model, ids)
        assert density < patch.report().density()
    assert_close("logits", *out)
