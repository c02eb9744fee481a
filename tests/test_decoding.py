"""Decode steps of every method: padded, with a static cache, after rows have moved, and with nothing remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_invariants import acts_on, assert_close, built
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hfpatch import patched

PROMPT, STEPS = 57, 6
LENGTHS = [PROMPT + STEPS, 40, 25]
MODELS = ["llama", "gemma2", "gpt_oss"]  # GQA; sliding layers and soft-capping; sink logits
CASES = [
    pytest.param(tiny, case, id=f"{name}-{case}")
    for name in MODELS
    for tiny in [zoo.SUPPORTED[name]]
    for case in METHODS
    if acts_on(tiny, case)
]
REBUILT = [pair for pair in CASES if not pair.id.endswith("-act")]  # its sums over earlier queries are in no key
every = pytest.mark.parametrize("tiny,case", CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def model_of(tiny: zoo.TinyModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return built(tiny.name) if dtype == torch.float32 else tiny.build().to(dtype)


def given(mask: Tensor, last: int) -> dict[str, Tensor]:
    """What `generate` says of padded tokens: the mask, and the positions of the last ones."""
    return {"attention_mask": mask, "position_ids": zoo.positions(mask)[:, -last:]}


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: Any, start: int, mask: Tensor | None = None) -> list[Tensor]:
    """Logits `[B, V]` of the tokens from `start` on, one step each; what comes before is in the cache."""
    out = []
    for n in range(start, ids.shape[1]):
        extra = {} if mask is None else given(mask[:, : n + 1], 1)
        out.append(model(ids[:, n : n + 1], **{zoo.cache_name(model): cache}, **extra).logits[:, 0])
    return out


@torch.no_grad()
def prefilled(model: PreTrainedModel, ids: Tensor, cache: Any = None, mask: Tensor | None = None) -> Any:
    """A cache that holds the tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(ids, use_cache=True, **{zoo.cache_name(model): cache}, **({} if mask is None else given(mask, ids.shape[1])))
    return cache


def same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    assert len(got) == len(want) == STEPS
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"step {n}", a.float(), b.float(), tolerance)


@every
def test_padded_rows_decode_as_rows_alone(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    whole = zoo.prompt(model, len(LENGTHS), LENGTHS[0])
    ids, mask = zoo.left_pad(whole, LENGTHS)
    with patched(model, case.name, **case.settings) as patch:
        together = decode(model, ids, prefilled(model, ids[:, :PROMPT], mask=mask[:, :PROMPT]), PROMPT, mask)
        for row, length in enumerate(LENGTHS):
            one = whole[row : row + 1, :length]
            alone = decode(model, one, prefilled(model, one[:, : length - STEPS]), length - STEPS)
            same([step[row : row + 1] for step in together], alone)
        assert not patch.report().fallbacks()


@every
@dtypes
def test_a_static_cache_decodes_as_one_that_grows(tiny: zoo.TinyModel, case: MethodCase, dtype: torch.dtype) -> None:
    model = model_of(tiny, dtype)
    ids = zoo.prompt(model, 2, PROMPT + STEPS)
    with patched(model, case.name, **case.settings):
        want = decode(model, ids, prefilled(model, ids[:, :PROMPT]), PROMPT)
        static = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 9)
        got = decode(model, ids, prefilled(model, ids[:, :PROMPT], static), PROMPT)
    same(got, want, 1e-5 if dtype == torch.float32 else 2e-2)


@every
def test_rows_that_move_decode_as_if_they_had_always_stood_there(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 3, PROMPT + STEPS)
    order = torch.tensor([2, 0, 2])
    with patched(model, case.name, **case.settings):
        cache = prefilled(model, ids[:, :PROMPT])
        cache.reorder_cache(order)
        moved = decode(model, ids[order], cache, PROMPT)
        same(moved, decode(model, ids[order], prefilled(model, ids[order, :PROMPT]), PROMPT))


@pytest.mark.parametrize("tiny,case", REBUILT)
@dtypes
def test_nothing_remembered_is_worked_out_anew(tiny: zoo.TinyModel, case: MethodCase, dtype: torch.dtype) -> None:
    model = model_of(tiny, dtype)
    ids = zoo.prompt(model, 2, PROMPT + STEPS)
    with patched(model, case.name, **case.settings):
        want = decode(model, ids, prefilled(model, ids[:, :PROMPT]), PROMPT)
        cache = prefilled(model, ids[:, :PROMPT])
        for layer in cache.layers:
            vars(layer).pop("hfpatch_states", None)
        got = decode(model, ids, cache, PROMPT)
    same(got, want, 1e-5 if dtype == torch.float32 else 2e-2)
