"""What a patched model is used with: other implementations, odd masks, compiling, gradients, adapters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from injection_helpers import SPARSE, fresh
from test_invariants import LENGTH, assert_close, built, logits
from torch import Tensor

from hfpatch import patched


def test_the_base_follows_set_attn_implementation() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, "streaming", sink=2, window=8, phase="decode") as patch:
        model.set_attn_implementation("eager")
        logits(model, ids)
        assert {n for line in patch.report().lines for n in line.stats.executors} == {"eager"}
    with patched(model, **SPARSE) as patch:
        sparse = logits(model, ids)
        model.set_attn_implementation("sdpa")
        assert_close("logits", logits(model, ids), sparse)
    assert model.config._attn_implementation == "sdpa"
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_weights_come_from_the_base_and_the_report_says_so(name: str) -> None:
    model = fresh(name)
    model.set_attn_implementation("eager")
    ids = zoo.prompt(model, 2, LENGTH)
    with torch.no_grad():
        want = model(ids, output_attentions=True)
        with patched(model, **SPARSE) as patch:
            got = model(ids, output_attentions=True)
            assert set(patch.report().fallbacks()) == {"attention weights were asked for"}
            assert "dense in 1 of them: attention weights were asked for" in str(patch.report())
    assert torch.equal(got.logits, want.logits)
    assert len(got.attentions) == len(want.attentions) > 0
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))


def test_a_dense_patch_compiles_whole() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, 17)
    want = logits(model, ids)
    with patched(model, "dense"):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(logits(compiled, ids), want)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_sparse_patch_runs_compiled_with_graph_breaks() -> None:
    model = fresh(num_hidden_layers=1)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, **SPARSE):
        want = logits(model, ids)
        assert_close("logits", logits(torch.compile(model, backend="eager"), ids), want)
    torch._dynamo.reset()


def four_d(ids: Tensor) -> dict[str, Any]:
    """Every query also sees the next key: wider than causal."""
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1)
    return {"attention_mask": keep.expand(len(ids), 1, -1, -1)}


def additive(ids: Tensor) -> dict[str, Any]:
    bias = torch.linspace(-1, 0, LENGTH).expand(LENGTH, -1)
    causal = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
    return {"attention_mask": (bias.tril() + causal).expand(len(ids), 1, -1, -1)}


def packed(ids: Tensor) -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(30), torch.arange(LENGTH - 30)]).expand(len(ids), -1)}


def hole(ids: Tensor) -> dict[str, Any]:
    mask = torch.ones_like(ids)
    mask[0, 20:24] = 0
    return {"attention_mask": mask}


WIDER, HOLE = "more than causality", "padding inside a row"


@pytest.mark.parametrize(
    "name,odd,reason",
    [
        (name, odd, reason)
        for name in ("llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")
        for odd, reason in ((four_d, WIDER), (additive, WIDER), (packed, WIDER), (hole, HOLE))
        if (name, odd) != ("gpt_oss", packed)  # the model itself does not separate packed sequences
    ],
)
def test_odd_masks_run_dense_and_say_why(name: str, odd: Callable[[Tensor], dict[str, Any]], reason: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    kwargs = odd(ids)
    if zoo.SUPPORTED[name].sliding and odd in (four_d, additive):
        kwargs["attention_mask"] = dict.fromkeys(("full_attention", "sliding_attention"), kwargs["attention_mask"])
    want = logits(model, ids, use_cache=False, **kwargs)
    with patched(model, **SPARSE) as patch:
        got = logits(model, ids, use_cache=False, **kwargs)
        assert any(reason in r for r in patch.report().fallbacks()), patch.report().fallbacks()
        assert patch.report().density() == 1.0
    assert torch.equal(got, want)
    plain = logits(model, ids, use_cache=False)
    assert not torch.equal(want, plain)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_through_a_dense_patch(checkpointing: bool) -> None:
    model = fresh().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = zoo.prompt(model, 2, 17)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    want = gradients()
    with patched(model, "dense"):
        got = gradients()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_gradients_through_a_sparse_patch_equal_the_reference() -> None:
    model = fresh()
    ids = zoo.prompt(model, 2, 33)
    grads = []
    for executor in ("torch", "reference"):
        with patched(model, **SPARSE, executor=executor):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close("gradients", *grads)


def test_peft_adapters() -> None:
    peft = pytest.importorskip("peft", reason="peft, which nothing else needs, is not installed")
    model = fresh()
    ids = zoo.prompt(model, 2, LENGTH)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    want = logits(adapted, ids)
    with patched(model, **SPARSE):
        sparse = logits(adapted, ids)
    with patched(adapted, **SPARSE):
        assert torch.equal(logits(adapted, ids), sparse)
    assert not torch.equal(sparse, want) and torch.equal(logits(adapted, ids), want)
