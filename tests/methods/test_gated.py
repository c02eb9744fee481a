"""Gates: injected as the identity, on padded rows and in decoding, and models that have their own."""

from typing import Any

import pytest
import test_invariants as invariants
import torch
import zoo
from test_invariants import assert_close, built, logits
from torch import Tensor

import hfpatch
from hfpatch import PatchConfig, patched
from hfpatch.methods.gated.method import Gated, GatedConfig
from hfpatch.methods.streaming import StreamingConfig
from hfpatch.runtime.after_attention import read_after
from hfpatch.runtime.attention_source import dispatching

FREE = [t for t in zoo.SUPPORTED.values() if not t.all_sliding and t.name != "qwen3_next"]
free = pytest.mark.parametrize("tiny", FREE, ids=lambda t: t.name)
forms = pytest.mark.parametrize("granularity", ["headwise", "elementwise"])


def test_a_second_gate_is_refused() -> None:
    model = built("qwen3_next")
    before = invariants.tree(model)
    with pytest.raises(hfpatch.UnsupportedModelError, match=r"gate Qwen3NextAttention twice.*sigmoid\(gate\)"):
        hfpatch.patch_model(model, "gated")
    assert invariants.tree(model) == before
    with patched(model, [StreamingConfig(sink=1, window=8)]):
        logits(model, zoo.prompt(model, 1, 63))


NATIVE = [
    "afmoe",
    "axk2",
    "beam",
    "dots3_note",
    "hrm_text",
    "hy_v4",
    "laguna",
    "lfm3",
    "qwen3_5",
    "qwen3_next",
    "qwen4_exp",
    "step3p7",
]
BUSY = {
    "inkling2": "hidden_states",
    "bitnet": "attn_sub_norm",
    "diffllama": "groupnorm",
    "jetmoe": "experts.reduce",
    "deepseek_v4": "rotary",
}
PLAIN = [
    "llama",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "qwen2",
    "qwen3",
    "phi3",
    "deepseek_v3",
    "olmo2",
    "cohere2",
    "smollm3",
    "granite",
]


def read_class(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What lies between attention and projection in the text attention class of a model type."""
    module = pytest.importorskip(
        f"transformers.models.{name}.modeling_{name}", reason="this release has no such model type"
    )
    classes = [c for n, c in vars(module).items() if n.endswith("Attention") and isinstance(c, type)]
    for cls in classes:
        function = dispatching(cls)
        if function is not None and "Vision" not in cls.__name__ and "Audio" not in cls.__name__:
            return read_after(function)
    pytest.skip("this release has no such class")


@pytest.mark.parametrize("name", [*NATIVE, *BUSY, *PLAIN])
def test_reading_what_follows_attention(name: str) -> None:
    gates, found = read_class(name)
    if name in BUSY:
        assert any(BUSY[name] in operation for operation in found)
    else:
        assert not found and bool(gates) == (name in NATIVE)


def gates_for(model: Any, layers: list[int], elementwise: bool, scale: float = 0.3) -> dict[str, Tensor]:
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    rows = heads * 16 if elementwise else heads
    return {f"0.layers.{n}.weight": scale * torch.randn(rows, text.hidden_size) for n in layers}


@free
def test_identity_start_is_exact(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, 63)
    want = logits(model, ids)
    for settings in ({}, {"granularity": "elementwise"}, {"form": "constant"}):
        with patched(model, "gated", **settings) as patch:
            assert torch.equal(logits(model, ids), want)
            assert len(patch.config.tensors) == len(tiny.full_layers)
            assert any("gates are new" in note for note in patch.report().notes)


def test_bias_form_starts_near_the_identity() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, 63)
    want, error = logits(model, ids), {}
    for bias in (0.0, 4.0, 12.0):
        with patched(model, "gated", form="sigmoid", start_bias=bias):
            error[bias] = float((logits(model, ids) - want).abs().max() / want.abs().max())
    assert error[12.0] < 1e-4 < error[4.0] < 0.2 < error[0.0]


@free
@forms
def test_gates_on_padded_rows_and_in_decoding(tiny: zoo.TinyModel, granularity: str) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, 63)
    batch, mask = zoo.left_pad(ids, [63, 30])
    extra = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    config = PatchConfig([GatedConfig()], None, gates_for(model, tiny.full_layers, granularity == "elementwise"))
    with patched(model, config) as patch, torch.no_grad():
        want = logits(model, ids[1:, :30])
        assert_close("padded", logits(model, batch, attention_mask=mask, **extra)[1, 33:], want[0])
        cache = model(ids[1:, :27], use_cache=True).past_key_values
        for n in range(27, 30):
            assert_close(f"decode {n}", model(ids[1:, n : n + 1], past_key_values=cache).logits[:, 0], want[:, n])
        assert not patch.report().fallbacks()
    assert invariants.relative(logits(model, ids[1:, :30]), want) > 1e-2


@pytest.mark.parametrize(
    "tensors,match",
    [
        ({"0.layers.0.constant": torch.ones(8)}, "does not belong"),
        ({"0.layers.0.weight": torch.ones(9, 64)}, r"\[9, 64\]; for this model it takes .* \[8, 64\] or \[128, 64\]"),
        ({"0.layers.0.weight": torch.ones(8, 64), "0.layers.7.weight": torch.ones(8, 64)}, "does not belong"),
    ],
)
def test_wrong_gates_are_refused(tensors: dict[str, Tensor], match: str) -> None:
    with pytest.raises(hfpatch.ConfigError, match=match):
        hfpatch.patch_model(built("llama"), PatchConfig([GatedConfig()], None, tensors))


def test_gates_learn() -> None:
    model = zoo.SUPPORTED["llama"].build().requires_grad_(False)
    ids = zoo.prompt(model, 1, 20)
    with patched(model, "gated") as patch:
        logits(model, ids)
        method = patch.methods[0]
        assert isinstance(method, Gated)
        for t in method.tensors().values():
            t.requires_grad_()
        model(ids).logits.square().mean().backward()
        assert all(t.grad is not None and t.grad.abs().max() > 0 for t in method.tensors().values())
