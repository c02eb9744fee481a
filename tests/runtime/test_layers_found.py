"""Which layers of a model are taken: those of the text decoder that a method can act on, by what their code says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
import zoo
from survey.build import CAUSAL, VISION, build
from survey.judge import judge
from survey.verdict import REFUSED, RIGHT
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpatch
from hfpatch.config.patch_config import PatchConfig
from hfpatch.errors import HfpatchError, NothingPatchedError
from hfpatch.runtime.attention_source import attention_source, keywords_read
from hfpatch.runtime.injection import runtime_of

# patched layers and all: towers, one module for several cache layers, decoders that are not called causal
TAKEN = {
    "phi4_multimodal": (4, 4), "modernbert-decoder": (2, 4), "zamba2": (2, 4), "hrm_text": (4, 4), "dory": (2, 4),
    "blt": (4, 16), "bigbird_pegasus": (4, 4), "moshi": (4, 4),
}  # fmt: skip
NEVER = ["doge", "deepseek_v4", "inkling_text", "inkling2_text", "glm_moe_dsa", "t5gemma2"]
BIASED = {
    "T5Config": "T5ForConditionalGeneration", "UMT5Config": "UMT5ForConditionalGeneration",
    "LongT5Config": "LongT5ForConditionalGeneration", "UdopConfig": "UdopForConditionalGeneration",
    "SwitchTransformersConfig": "SwitchTransformersForConditionalGeneration",
}  # fmt: skip


def known(name: str) -> None:
    if name not in CONFIG_MAPPING or name not in {**CAUSAL, **VISION}:
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")


@pytest.mark.skipif(
    zoo.RELEASE < (5, 24), reason="older releases write these models differently; the counts are of 5.24"
)
@pytest.mark.parametrize("name", TAKEN)
def test_layers_of_the_text_decoder_are_taken_and_right(name: str) -> None:
    known(name)
    verdict = judge(name)
    assert (verdict.verdict, verdict.reason, verdict.patched, verdict.layers) == (RIGHT, "", *TAKEN[name])


@pytest.mark.parametrize("name", NEVER)
def test_what_could_never_act_is_refused_at_once(name: str) -> None:
    known(name)
    model = build(name)
    before = {k: vars(m).copy() for k, m in model.named_modules()}
    with pytest.raises(HfpatchError, match=r"native-sparse|position-bias|not causal|relative|AttentionInterface"):
        hfpatch.patch_model(model, "streaming")
    assert before == {k: vars(m) for k, m in model.named_modules()}
    assert judge(name).verdict == REFUSED


@pytest.mark.parametrize("config", BIASED)
def test_position_biases_are_refused_at_once(config: str) -> None:
    cls: Any = getattr(transformers, BIASED[config])
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    model = cls(getattr(transformers, config)(**sizes, vocab_size=64))
    with pytest.raises(HfpatchError, match=r"position-bias|AttentionInterface"):
        hfpatch.patch_model(model, "streaming")


# infiniretri wants a tokenizer and layers of its own
@pytest.mark.parametrize("method", [name for name in hfpatch.list_methods() if name != "infiniretri"])
def test_no_method_is_put_where_none_can_act(method: str) -> None:
    known("doge")
    model = build("doge")
    with pytest.raises(HfpatchError) as told:
        hfpatch.patch_model(model, PatchConfig([hfpatch.get_method(method).config_class()]))
    assert isinstance(told.value, NothingPatchedError) or method in str(told.value)
    assert not [m for m in model.modules() if runtime_of(m) is not None]


def test_reasons_hold_no_sizes_of_a_call() -> None:
    model = build("llama")
    heads = model.config.num_attention_heads
    with hfpatch.patched(model, "streaming", sink=1, window=4) as patch, torch.no_grad():
        for length in range(8, 20):
            for some in (1, heads):
                mask = torch.rand(1, some, length, length).round()
                model(torch.full((1, length), 20), attention_mask=mask * torch.finfo(torch.float32).min)
        told = patch.report().fallbacks()
    assert told and not [reason for reason in told if re.search(r"\d", reason)]


class Plain(nn.Module):
    def forward(self, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attention_interface(self, x, x, x, attention_mask, scaling=1.0, **kwargs)


class Renamed(nn.Module):
    def forward(self, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, x, x, x, attention_mask=attention_mask, position_bias=x, **kwargs)


class Cut(nn.Module):
    def forward(self, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask = attention_mask[..., : x.shape[-2]]
        return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, x, x, x, attention_mask, **kwargs)


class Choosing(nn.Module):
    def forward(self, x: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        chosen = x.sum(-1).topk(2).indices
        attention_mask = attention_mask + chosen[:, None]
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attention_interface(self, x, x, x, attention_mask, **kwargs)


class Inherited(Renamed):
    pass


@pytest.mark.parametrize(
    "cls,named,own_mask",
    [
        (Plain, {"scaling"}, False),
        (Renamed, {"attention_mask", "position_bias"}, False),
        (Cut, set(), False),
        (Choosing, set(), True),
        (Inherited, {"attention_mask", "position_bias"}, False),
    ],
)
def test_the_source_tells_what_attention_is_given(cls: Any, named: set[str], own_mask: bool) -> None:
    found = attention_source(cls())
    assert found is not None and (found.named, found.own_mask) == (named, own_mask)


def test_a_module_beside_the_interface_has_no_such_source() -> None:
    assert attention_source(nn.Linear(2, 2)) is None


def base(module: Any, q: Any, *, scaling: Any = None, **kwargs: Any) -> Any:
    if kwargs.get("output_attentions") or kwargs["softcap"] or "is_causal" in kwargs:
        return further(q, **kwargs)
    return scaling


def further(q: Any, *, s_aux: Any = None, **rest: Any) -> Any:
    return rest.pop("window", s_aux)


def closed(q: Any, scale: Any) -> Any:
    return q * scale


def test_the_source_tells_which_keywords_a_base_function_looks_at() -> None:
    read = keywords_read(base)
    assert read is not None
    assert {"scaling", "output_attentions", "softcap", "is_causal", "s_aux", "window"} <= read
    assert not {"tokenizer", "kwargs", "token_type_ids"} & read
    assert keywords_read(closed) == {"q", "scale"} and keywords_read(len) is None
