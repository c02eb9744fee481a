"""Methods that route rows to others, and what may not meet on one layer."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from toy_methods import (
    LENGTH,
    DenseRouter,
    Recorder,
    Router,
    architectures,
    make,
    padded,
    some,
    toys,  # noqa: F401  (registers the toys around each test)
)

import hfpatch
from hfpatch import IncompatibleMethodsError, patched
from hfpatch.methods.flux.method import FluxConfig
from hfpatch.methods.streaming import StreamingConfig
from hfpatch.methods.zerotuning import ZeroTuningConfig


@some
@pytest.mark.parametrize("where", ["plain", "left"])
def test_routed_rows_equal_rows_alone(name: str, where: str) -> None:
    tiny, model = zoo.SUPPORTED[name], built(name)
    lengths = [LENGTH] * 6 if where == "plain" else [LENGTH, 26, 26, 33, LENGTH, 19]
    ids = zoo.prompt(model, len(lengths), LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    pos = {"position_ids": zoo.positions(mask)} if tiny.learned_positions else {}
    extra = {"attention_mask": mask, **pos}
    with patched(model, make(Router)) as patch:
        got = logits(model, batch, **extra)
        density = patch.report().density()
        for row, n in enumerate(lengths):
            assert_close(f"row {row}", got[row][mask[row].bool()], logits(model, ids[row : row + 1, :n])[0])
    assert 0.3 < density < 0.99


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_route_is_kept_from_prefill_to_decode(name: str) -> None:
    model = built(name)
    lengths = [LENGTH, 30, 30, LENGTH]
    ids = zoo.prompt(model, 4, LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with patched(model, make(Router)) as patch:
        router = patch.methods[0]
        got = model.generate(batch, attention_mask=mask, **how)[:, LENGTH:]
        assert router.decided == 2 * len(patch.layers)
        for row, n in enumerate(lengths):
            one = ids[row : row + 1, :n]
            assert torch.equal(got[row], model.generate(one, attention_mask=torch.ones_like(one), **how)[0, n:])


@architectures
def test_routing_everything_to_dense_changes_no_bit(tiny: zoo.TinyModel) -> None:
    model = built(tiny.name)
    batch, kwargs = padded(tiny)
    want = logits(model, batch, **kwargs)
    with patched(model, make(DenseRouter)):
        assert torch.equal(logits(model, batch, **kwargs), want)


def test_two_routers_on_one_layer_are_refused() -> None:
    model = built("llama")
    with (
        pytest.raises(IncompatibleMethodsError, match=r"'toy-Router' and 'toy-DenseRouter'"),
        patched(model, [make(Router), make(DenseRouter)]),
    ):
        pass
    with patched(model, [make(Router, layers=0), make(DenseRouter, layers="1-")]) as patch:
        assert patch.layers == [0, 1, 2]


def test_two_executors_on_one_layer_are_refused() -> None:
    model = built("llama")
    asks = [StreamingConfig(sink=1, window=4, executor=name) for name in ("torch", "reference")]
    routed = FluxConfig(executor="torch", sparse_settings={"executor": "reference"})
    beside = [FluxConfig(sparse_settings={"executor": "torch"}), ZeroTuningConfig(gamma=2.0, executor="reference")]
    for methods in (asks, [*asks[:1], make(Recorder), *asks[1:]], routed, beside):
        with pytest.raises(IncompatibleMethodsError, match=r"executor '\w+'.*for '\w+' on the same layer; name one"):
            hfpatch.patch_model(model, methods)
    for other in (replace(asks[0], layers=0), StreamingConfig(layers="1-")):
        with patched(model, [other, replace(asks[1], layers="1-")]) as patch:
            logits(model, zoo.prompt(model, 1, LENGTH))
            ran = {line.layer: set(line.stats.executors) for line in patch.report().lines}
            assert ran[1] == ran[2] == {"reference"}


def test_an_executor_named_for_a_router_runs_what_it_routes() -> None:
    model = built("llama")
    narrow = {"sink": 1, "window": 4}
    for settings in (
        {"executor": "reference", "sparse_settings": narrow},
        {"sparse_settings": {**narrow, "executor": "reference"}},
    ):
        with patched(model, "flux", sparse_layers="0-", **settings) as patch:
            logits(model, zoo.prompt(model, 1, LENGTH))
            assert all(set(line.stats.executors) == {"reference"} for line in patch.report().lines)
