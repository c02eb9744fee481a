"""Queries before RoPE, for methods that read them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hfpatch
from hfpatch import Method, MethodConfig, patched, register_method, unpatch_model
from hfpatch.core.call import AttentionCall

SEEN: list[AttentionCall] = []


@dataclass(kw_only=True)
class SpyConfig(MethodConfig):
    method: ClassVar[str] = "test-query-spy"


@register_method
class Spy(Method):
    config_class = SpyConfig
    needs = frozenset({"q_pre_rope"})

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        SEEN.append(call)


READABLE = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "qwen3_next", "gpt_oss"]


@pytest.mark.parametrize("name", READABLE)
@torch.no_grad()
def test_rotating_them_gives_the_call_s_queries(name: str) -> None:
    model = zoo.SUPPORTED[name].build()
    batch, mask = zoo.left_pad(zoo.prompt(model, 2, 20), [20, 13])
    SEEN.clear()
    with patched(model, "test-query-spy"):
        model(batch, attention_mask=mask)
    assert SEEN
    for call in SEEN:
        assert call.q_pre_rope is not None and call.q_pre_rope.shape == call.q.transpose(1, 2).shape
        assert torch.allclose(call.q_pre_rope.norm(dim=-1), call.q.transpose(1, 2).norm(dim=-1), rtol=1e-4)


@torch.no_grad()
def test_llama_s_own_rotation() -> None:
    model = zoo.SUPPORTED["llama"].build()
    SEEN.clear()
    with patched(model, "test-query-spy"):
        model(zoo.prompt(model, 2, 20))
    call = SEEN[0]
    assert call.q_pre_rope is not None
    cos, sin = model.model.rotary_emb(call.q, torch.arange(20)[None])
    rotated, _ = apply_rotary_pos_emb(call.q_pre_rope.transpose(1, 2), call.k, cos, sin)
    assert torch.allclose(rotated, call.q, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox", "deepseek_v3"])
def test_unreadable_queries_are_refused_before_anything_changes(name: str) -> None:
    model = zoo.SUPPORTED[name].build()
    with pytest.raises(hfpatch.UnsupportedModelError, match="queries before RoPE"):
        hfpatch.patch_model(model, "test-query-spy")
    with pytest.raises(hfpatch.NotPatchedError):
        unpatch_model(model)


def test_no_hook_and_no_tensor_stays() -> None:
    model = zoo.SUPPORTED["qwen3"].build()
    before = {n: (dict(vars(m)), dict(m._forward_hooks)) for n, m in model.named_modules()}
    with patched(model, "test-query-spy"), torch.no_grad():
        model(zoo.prompt(model, 1, 20))
    after = {n: (dict(vars(m)), dict(m._forward_hooks)) for n, m in model.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[n][0].keys() == after[n][0].keys() and before[n][1] == after[n][1] for n in before)
