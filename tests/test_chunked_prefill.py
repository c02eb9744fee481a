"""A prompt that comes in chunks, some above and some below the size up to which a chunk counts as decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from methods_list import METHODS, MethodCase
from test_decoding import CASES, REBUILT, every, given, model_of
from test_invariants import assert_close, logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hfpatch import patched
from hfpatch.runtime.pipeline import FEW

LENGTH = 136
CUTS = (45, 85, 94, 95)  # chunks of 45, 40, 9, 1 and 41 tokens
LENGTHS = [LENGTH, 120, 101]
TILE = 16  # a multiple of every tile in the list
LATE = {"last_blocks", "question_tokens"}  # settings that make a choice hang on where the call ends
ONE_SHOT = [pair for pair in CASES if pair.values[1].causality == "yes" and not pair.values[1].one_phase]
BY_TILE = [
    pair
    for pair in CASES
    for case in [pair.values[1]]
    if (case.causality == "tile" and not LATE & set(case.settings)) or (case.causality == "yes" and case.one_phase)
]
# dhsa cuts what is new when it comes, and keeps those cuts: so its memory is part of what it does in chunks
KEYS_ALONE = [pair for pair in REBUILT if pair.values[1].name != "dhsa"]


@torch.no_grad()
def in_chunks(
    model: PreTrainedModel, ids: Tensor, cuts: Sequence[int], cache: Any = None, mask: Tensor | None = None,
    forget: bool = False,
) -> Tensor:  # fmt: skip
    """Logits `[B, L, V]` of tokens that come in chunks, each after the cache of those before; `forget` leaves keys."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    out = []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        for layer in cache.layers if forget else ():
            vars(layer).pop("hfpatch_states", None)
        more = {} if mask is None else given(mask[:, :stop], stop - start)
        out.append(model(ids[:, start:stop], use_cache=True, **{zoo.cache_name(model): cache}, **more).logits)
    return torch.cat(out, 1)


def test_chunks_are_of_both_kinds() -> None:
    sizes = [b - a for a, b in zip(CUTS, (*CUTS[1:], LENGTH), strict=True)]
    assert {size > FEW for size in sizes} == {size > 1 for size in sizes} == {True, False}
    assert any(1 < size <= FEW for size in sizes) and all(TILE % case.tile == 0 for case in METHODS)


@pytest.mark.parametrize("tiny,case", ONE_SHOT)
def test_causal_methods_give_the_logits_of_one_shot(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings) as patch:
        assert_close("logits", in_chunks(model, ids, CUTS), logits(model, ids))
        assert not patch.report().fallbacks()


@pytest.mark.parametrize("tiny,case", [p for p in ONE_SHOT if p.id.startswith("llama-")])
def test_causal_methods_in_half_precision(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny, torch.bfloat16)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings):
        assert_close("logits", in_chunks(model, ids, CUTS).float(), logits(model, ids).float(), 2e-2)


@pytest.mark.parametrize("tiny,case", BY_TILE)
def test_large_chunks_that_begin_with_tiles_give_one_shot(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings):
        assert_close("logits", in_chunks(model, ids, (3 * TILE, 6 * TILE)), logits(model, ids))


@every
def test_keep_all_equals_dense_in_chunks(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, LENGTH)
    want = logits(model, ids)
    with patched(model, case.name, **{**case.settings, **case.keep_all}):
        assert_close("logits", in_chunks(model, ids, CUTS), want)


@every
def test_a_few_tokens_after_a_large_chunk_are_decode_steps(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, 94)
    with patched(model, case.name, **case.settings):
        chunk, steps = in_chunks(model, ids, (45, 85)), in_chunks(model, ids, (45, *range(85, 94)))
        assert_close("logits", chunk, steps)


@every
def test_padded_rows_come_in_chunks_as_rows_alone(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    whole = zoo.prompt(model, len(LENGTHS), LENGTH)
    ids, mask = zoo.left_pad(whole, LENGTHS)
    with patched(model, case.name, **case.settings) as patch:
        together = in_chunks(model, ids, CUTS, mask=mask)
        for row, n in enumerate(LENGTHS):
            alone = in_chunks(model, whole[row : row + 1, :n], [cut - LENGTH + n for cut in CUTS])
            assert_close(f"row {row}", together[row, LENGTH - n :], alone[0])
        assert not patch.report().fallbacks()


@every
def test_a_static_cache_takes_chunks_as_one_that_grows(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings):
        static = StaticCache(config=model.config, max_cache_len=LENGTH + 9)
        assert_close("logits", in_chunks(model, ids, CUTS, static), in_chunks(model, ids, CUTS))


@pytest.mark.parametrize("tiny,case", KEYS_ALONE)
def test_chunks_need_nothing_remembered(tiny: zoo.TinyModel, case: MethodCase) -> None:
    model = model_of(tiny)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, case.name, **case.settings):
        assert_close("logits", in_chunks(model, ids, CUTS, forget=True), in_chunks(model, ids, CUTS))
