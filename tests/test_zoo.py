"""The facts about the tiny models that other tests rely on, measured on the unpatched models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import sample_of
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpatch import Method, patched

LENGTH = 63
SHORT = 40
TOLERANCE = 1e-5
PLAIN_WINDOW = 4

supported = pytest.mark.parametrize("tiny", zoo.SUPPORTED.values(), ids=lambda tiny: tiny.name)
every = pytest.mark.parametrize("tiny", [*zoo.SUPPORTED.values(), *zoo.REFUSED.values()], ids=lambda tiny: tiny.name)
refused = pytest.mark.parametrize("tiny", zoo.REFUSED.values(), ids=lambda tiny: tiny.name)
vision = pytest.mark.parametrize("name", [t.name for t in zoo.SUPPORTED.values() if t.vision])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run on one thread: the models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def built(name: str) -> PreTrainedModel:
    """A model shared by the tests of this file."""
    return (zoo.SUPPORTED.get(name) or zoo.REFUSED[name]).build()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of the reference."""
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits of one forward pass without a cache."""
    return model(ids, use_cache=False, **kwargs).logits


def windowed(base: Callable[..., Any], width: int) -> Callable[..., Any]:
    """The attention function `base` restricted to the last `width` keys of each query."""

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        age = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None]
        keep = (age >= 0) & (age < width)
        if mask is not None:
            keep = keep & (mask if mask.dtype == torch.bool else mask > -1.0)
        bias = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(q.dtype).min)
        return base(module, q, k, v, bias.expand(q.shape[0], 1, -1, -1), **kw)

    return attend


@contextmanager
def interface(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Wrap every attention function that modules look up."""
    cls = type(ALL_ATTENTION_FUNCTIONS)
    original = cls.get_interface

    def get(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return wrap(original(self, name, default))

    cls.get_interface = get
    try:
        yield
    finally:
        cls.get_interface = original


@contextmanager
def recorded() -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """Collect the module, the shapes and the keyword arguments of each attention call."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def wrap(base: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kw: Any) -> Any:
            calls.append((module, {**kw, "q": q.shape, "k": k.shape, "v": v.shape}))
            return base(module, q, k, v, attention_mask, **kw)

        return attend

    with interface(wrap):
        yield calls


@every
def test_builds_are_identical(tiny: zoo.TinyModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two = built(tiny.name).state_dict(), tiny.build().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) and one[key].isfinite().all() for key in one)
    assert all(p.dtype == torch.float32 for p in built(tiny.name).parameters())
    assert not built(tiny.name).training


@every
def test_logits_are_finite_and_moderate(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    out = logits(model, zoo.prompt(model, 2, LENGTH))
    assert out.shape == (2, LENGTH, zoo.VOCAB)
    assert out.isfinite().all()
    assert 0.1 < out.std() < 20


@supported
def test_attention_calls(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    with recorded() as calls:
        logits(model, zoo.prompt(model, 1, LENGTH))
    full = [module.layer_idx for module, kw in calls if kw.get("sliding_window") is None]
    windows = {kw["sliding_window"] for _, kw in calls if kw.get("sliding_window") is not None}
    assert full == tiny.full_layers
    assert windows == ({zoo.WINDOW} if tiny.sliding else set())
    assert all(kw["q"][1] == tiny.gqa * kw["k"][1] for _, kw in calls)
    assert all((kw.get("softcap") is not None) == tiny.softcap for _, kw in calls)
    assert all((kw.get("s_aux") is not None) == tiny.sinks for _, kw in calls)
    assert all((kw["k"][-1] != kw["v"][-1]) == tiny.asymmetric for _, kw in calls)
    decoder = set(model.get_decoder().modules())
    assert all(module in decoder for module, _ in calls)


@supported
def test_attention_matters(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 1, LENGTH)
    exact = logits(model, ids)
    with interface(lambda base: windowed(base, LENGTH)):
        assert relative(logits(model, ids), exact) < TOLERANCE
    with interface(lambda base: windowed(base, PLAIN_WINDOW)):
        effect = relative(logits(model, ids), exact)
    assert effect > 1e-2


@refused
def test_refused_models_bypass_the_interface(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    with recorded() as calls:
        logits(model, zoo.prompt(model, 1, 8))
    assert not calls


@supported
@pytest.mark.parametrize("pad", [zoo.left_pad, zoo.right_pad])
def test_padded_rows_equal_rows_alone(tiny: zoo.TinyModel, pad: Callable[..., tuple[Tensor, Tensor]]) -> None:
    model = built(tiny.name)
    worst = 0.0
    for seed in range(3):
        ids = zoo.prompt(model, 3, LENGTH, seed)
        lengths = [LENGTH, SHORT, 5]
        padded, mask = pad(ids, lengths)
        out = logits(model, padded, attention_mask=mask, position_ids=zoo.positions(mask))
        for row, count in enumerate(lengths):
            alone = logits(model, ids[row : row + 1, :count])[0]
            worst = max(worst, relative(out[row][mask[row].bool()], alone))
    assert (worst < TOLERANCE) == tiny.padding_exact


@supported
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_one_pass(tiny: zoo.TinyModel, padded: bool) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, LENGTH)
    ids, mask = zoo.left_pad(ids, [LENGTH, SHORT if padded else LENGTH])
    where = zoo.positions(mask)
    exact = logits(model, ids, attention_mask=mask, position_ids=where)
    start = LENGTH - 5
    out = model(ids[:, :start], attention_mask=mask[:, :start], position_ids=where[:, :start], use_cache=True)
    parts, cache = [out.logits], out.past_key_values
    for t in range(start, LENGTH):
        step = slice(t, t + 1)
        kwargs = {"attention_mask": mask[:, : t + 1], "position_ids": where[:, step]}
        parts.append(model(ids[:, step], past_key_values=cache, use_cache=True, **kwargs).logits)
    kept = mask.bool()
    error = relative(torch.cat(parts, 1)[kept], exact[kept])
    assert (error < TOLERANCE) == tiny.cached_exact


@supported
def test_learned_positions_need_position_ids(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    ids = zoo.prompt(model, 2, LENGTH)
    padded, mask = zoo.left_pad(ids, [LENGTH, SHORT])
    out = logits(model, padded, attention_mask=mask)[1, -SHORT:]
    error = relative(out, logits(model, ids[1:, :SHORT])[0])
    assert (error > 5e-5) == tiny.learned_positions


@every
def test_generate_runs_its_full_length(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, 20), [20, 12])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert out.shape == (2, 26)


@vision
@torch.no_grad()
def test_vision_towers_use_the_interface(name: str) -> None:
    model = built(name)
    if name == "qwen2_vl":
        pixels = {"pixel_values": torch.randn(16, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    else:
        pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    with recorded() as calls:
        model.get_image_features(**pixels)
    decoder = set(model.get_decoder().modules())
    assert len(calls) == 2
    assert all(module not in decoder and module.config is not model.get_decoder().config for module, _ in calls)


def test_padding_helpers() -> None:
    ids = torch.tensor([[11, 12, 13], [21, 22, 23]])
    padded, mask = zoo.left_pad(ids, [3, 1])
    assert padded.tolist() == [[11, 12, 13], [0, 0, 21]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert zoo.positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    padded, mask = zoo.right_pad(ids, [3, 1])
    assert padded.tolist() == [[11, 12, 13], [21, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_prompts_are_seeded_and_plain() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 4, 200, seed=3)
    assert torch.equal(ids, zoo.prompt(model, 4, 200, seed=3))
    assert not torch.equal(ids, zoo.prompt(model, 4, 200, seed=4))
    assert ids.min() >= zoo.FIRST_PLAIN_ID and ids.max() < zoo.VOCAB


@pytest.mark.parametrize("name", [name for name in zoo.NEAR_TWINS if name in zoo.SUPPORTED])
def test_near_twins_run_methods_of_every_kind(name: str) -> None:
    of, why = zoo.NEAR_TWINS[name]
    assert of in zoo.SUPPORTED and of not in zoo.NEAR_TWINS and why
    methods = [made(case) for case in sample_of(zoo.SUPPORTED[name])]
    assert {"dense", "streaming"} <= {m.name for m in methods}
    assert any(m.causality == "tile" for m in methods) and any(m.stateful for m in methods)
    assert any("reweight" in m.points() for m in methods)


def made(case: MethodCase) -> Method:
    with patched(built("llama"), case.name, **case.settings) as patch:
        return patch.methods[0]


def test_every_method_runs_on_some_near_twin() -> None:
    ran = {str(case) for name in zoo.NEAR_TWINS if name in zoo.SUPPORTED for case in sample_of(zoo.SUPPORTED[name])}
    assert ran == {str(case) for case in METHODS}
