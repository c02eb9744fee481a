"""Decode steps of every method: padded, in a static cache, after rows moved, in beams, with nothing remembered."""

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
SAMPLE = [
    "streaming",
    "block_topk",
    "quest",
    "dhsa-fixed",
    "zerotuning",
    "gated",
]  # of beams in half precision
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


@every
@torch.no_grad()
def test_beams_are_scored_as_rows_that_never_moved(tiny: zoo.TinyModel, case: MethodCase) -> None:
    """Each sequence found, decoded token by token in a cache no beam has moved in, has the logits the search saw."""
    beams_score_as_rows(model_of(tiny), case, 1e-5)


@pytest.mark.parametrize("case", [case for case in METHODS if str(case) in SAMPLE], ids=str)
@torch.no_grad()
def test_beams_in_half_precision(case: MethodCase) -> None:
    beams_score_as_rows(model_of(zoo.SUPPORTED["llama"], torch.bfloat16), case, 2e-2)


def beams_score_as_rows(model: PreTrainedModel, case: MethodCase, tolerance: float) -> None:
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, PROMPT), [PROMPT, 34])
    with patched(model, case.name, **case.settings) as patch:
        found = model.generate(
            ids, attention_mask=mask, num_beams=3, num_return_sequences=3, do_sample=False, output_logits=True,
            max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1, return_dict_in_generate=True,
        )  # fmt: skip
        came_from = found.beam_indices[:, : STEPS + 1]
        assert (came_from[:, 1:] != came_from[:, :-1]).any(), "no beam has moved: another prompt, please"
        whole = torch.cat([mask.repeat_interleave(3, 0), mask.new_ones(6, STEPS)], 1)
        rows = found.sequences[:, :-1]
        cache = prefilled(model, rows[:, :PROMPT], mask=whole[:, :PROMPT])
        want = decode(model, rows, cache, PROMPT, whole)
        assert not patch.report().fallbacks()
    same([found.logits[n][came_from[:, n]] for n in range(1, STEPS + 1)], want, tolerance)


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
