"""Patched models train: choices and statistics stay out of the graph, and a layer run twice does the same twice."""

import warnings
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from torch import Tensor
from transformers import PreTrainedModel

from hfpatch import PatchConfig, get_patch, patched
from hfpatch.methods.dhsa import DhsaConfig
from hfpatch.methods.dhsa.predictor import BoundaryPredictor
from hfpatch.methods.flux import FluxConfig
from hfpatch.methods.flux.router import Routers

LENGTH = 63
SPARSE = {"sparse_settings": {"sink": 2, "window": 8}}
GATED = [MethodCase("gated", {"form": form}, label=f"gated-{form}") for form in ("double", "sigmoid", "constant")]
DHSA = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "question_tokens": 0}
MEANS = {
    "min_length": 0,
    "block_q": 8,
    "block_k": 8,
    "alpha": 0.6,
    "last_blocks": 0,
    "sink_blocks": 1,
    "window_blocks": 1,
}
MORE = [
    MethodCase("flux", {"router": "oracle", "tolerance": 0.3, **SPARSE}, label="flux-oracle"),
    MethodCase("dhsa", {**DHSA, "boundaries": "oracle"}, label="dhsa-oracle"),
    MethodCase("flash_prefill", {**MEANS, "mean_correction": True}, label="mean-correction"),
]
CASES = [*METHODS, *GATED, *MORE]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def tiny() -> PreTrainedModel:
    return zoo.SUPPORTED["llama"].build(use_cache=False).train()


def learned(name: str) -> PatchConfig:
    """A patch with trained parts: boundaries by a predictor, routes by routers."""
    if name == "dhsa":
        config: Any = DhsaConfig(**DHSA, boundaries="predictor")
        tensors = BoundaryPredictor(32, width=8, heads=2, hidden=8).tensors()
    else:
        config, tensors = FluxConfig(router="learned", pool=10, **SPARSE), Routers(range(3), 16).state_dict()
    return PatchConfig([config], tensors={f"0.{k}": t for k, t in tensors.items()})


def gradients(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_same_training(model: PreTrainedModel, reentrant: bool, patch: Any) -> None:
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, *patch[0], **patch[1]):
        want = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with patched(model, *patch[0], **patch[1]):
        for _ in range(2):
            got = gradients(model, ids)
            assert len(got) == len(want) > 0
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


@cases
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_activation_checkpointing_gives_the_same_gradients(case: MethodCase, reentrant: bool) -> None:
    assert_same_training(tiny(), reentrant, ((case.name,), case.settings))


@pytest.mark.parametrize("name", ["dhsa", "flux"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
def test_activation_checkpointing_with_trained_parts(name: str, reentrant: bool) -> None:
    assert_same_training(tiny(), reentrant, ((learned(name),), {}))


def held(value: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor reachable from an object through its attributes, containers and closures' cells left out."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in held(v, seen)]
    if isinstance(value, (list, tuple, set)):
        return [t for v in value for t in held(v, seen)]
    return [t for v in vars(value).values() for t in held(v, seen)] if hasattr(value, "__dict__") else []


@cases
def test_nothing_kept_holds_a_graph(case: MethodCase) -> None:
    """Neither the method nor the cache layer's state keeps a tensor of the graph, and the report reads without one."""
    model = tiny().eval()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings), warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(ids, use_cache=True)
        assert out.logits.requires_grad
        str(get_patch(model).report())
        model(ids[:, :1], past_key_values=out.past_key_values) if zoo.RELEASE < (5, 24) else model(
            ids[:, :1], cache=out.past_key_values
        )
        kept: list[Tensor] = []
        for method in get_patch(model).methods:
            kept += held({k: v for k, v in vars(method).items() if k not in ("watch",)}, set())
        for layer in out.past_key_values.layers:
            own = {k: v for k, v in vars(layer).items() if k not in ("keys", "values", "hfpatch_mark")}
            kept += held(own, set())
        assert not [t for t in kept if t.grad_fn is not None]


@cases
def test_a_model_used_in_inference_mode_trains_afterwards(case: MethodCase) -> None:
    model = tiny()
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings):
        with torch.inference_mode():
            model(ids)
        assert all(g.isfinite().all() for g in gradients(model, ids))
