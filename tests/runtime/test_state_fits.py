"""What methods remember fits the keys of the cache, or is begun anew: whatever was done to the cache in between."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hfpatch import patched
from hfpatch.runtime.cache_state import cache_states

DHSA = {"budget": 24, "sink": 2, "local": 4, "block_q": 4, "chunk": 4, "radius": 2, "window": 2, "question_tokens": 0}
QUEST: dict[str, Any] = {"method": "quest", "budget": 16, "page": 4, "min_length": 0}
METHODS: dict[str, dict[str, Any]] = {
    "quest": QUEST,
    "dhsa": {"method": "dhsa", **DHSA, "close_after": 6},
    "dhsa in decode": {"method": "dhsa", **DHSA, "close_after": 6, "phase": "decode"},
    "act": {"method": "act", "threshold": 0.02},
}
PROMPT, ANSWER, QUESTION = 60, 14, 40
Change = Callable[[DynamicCache], Any]


def cut_answer(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :PROMPT], layer.values[:, :, :PROMPT]


def drop_oldest(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 20:], layer.values[:, :, 20:]


def swap_rows(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[[1, 0]], layer.values[[1, 0]]


def one_row(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[1:], layer.values[1:]


def overwrite(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys[:, :, 8:16] = layer.keys[:, :, 16:24]


def replace(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys = layer.keys.flip(2)


def add_by_hand(cache: DynamicCache) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = (torch.cat([x, x[:, :, :9]], 2) for x in (layer.keys, layer.values))


CHANGES: list[Change] = [cut_answer, drop_oldest, swap_rows, one_row, overwrite, replace, add_by_hand]


def step(model: PreTrainedModel, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def used(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """A cache after a prompt and an answer."""
    cache = DynamicCache()
    step(model, ids[:, :PROMPT], cache)
    for t in range(PROMPT, PROMPT + ANSWER):
        step(model, ids[:, t : t + 1], cache)
    return cache


def forgetful(cache: DynamicCache) -> DynamicCache:
    """The same keys in a cache that remembers nothing."""
    other = DynamicCache()
    for n, layer in enumerate(cache.layers):
        other.update(layer.keys.clone(), layer.values.clone(), n)
    return other


@pytest.mark.thin(2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("question", [0, 5, QUESTION], ids=["decode", "few", "question"])
@torch.no_grad()
def test_keys_changed_by_hand(name: str, change: Change, question: int) -> None:
    """As if the cache with these keys had never been seen before; and the report says so."""
    model = built("llama")
    ids = zoo.prompt(model, 2, PROMPT + ANSWER)
    with patched(model, **METHODS[name]) as patch:
        cache = used(model, ids)
        change(cache)
        fresh = forgetful(cache)
        more = zoo.prompt(model, fresh.layers[0].keys.shape[0], question + 3, seed=1)
        patch.reset_report()
        for a, b in [(0, question)] * bool(question) + [(question + n, question + n + 1) for n in range(3)]:
            got, want = (step(model, more[:, a:b], c) for c in (cache, fresh))
            assert_close("logits", got, want)
        assert any("changed by hand" in note for note in patch.report().notes)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_untouched_caches_are_not_begun_anew(name: str) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 3, PROMPT + ANSWER)
    moves: list[Callable[[DynamicCache], Any]] = [
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0, 2])),
        copy.deepcopy,
        lambda c: None,
    ]
    for move in moves:
        with patched(model, **METHODS[name]) as patch:
            cache = used(model, ids)
            cache = move(cache) or cache
            rows = cache.layers[0].keys.shape[0]
            before = cache_states(cache, 0, patch._plan[0][1].key)
            assert before
            step(model, zoo.prompt(model, rows, 1, seed=2), cache)
            assert not any("by hand" in note or "begun anew" in note for note in patch.report().notes)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["quest", "dhsa", "dhsa in decode"])
@pytest.mark.parametrize("back", [1, 3, ANSWER, ANSWER + 7])
@pytest.mark.parametrize("question", [0, 5, QUESTION], ids=["decode", "few", "question"])
@torch.no_grad()
def test_what_was_taken_back_does_not_matter(name: str, back: int, question: int) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, PROMPT)
    more = zoo.prompt(model, 2, question + 3, seed=1)

    def after(seed: int | None) -> Tensor:
        cache = DynamicCache()
        step(model, ids, cache)
        wrong = zoo.prompt(model, 2, back, seed=seed or 9)
        kept = max(ANSWER - back, 0)
        for t in range(kept):
            step(model, zoo.prompt(model, 2, ANSWER, seed=5)[:, t : t + 1], cache)
        if seed is not None:
            for t in range(back):
                step(model, wrong[:, t : t + 1], cache)
            cache.crop(-back)
        out = [step(model, more[:, :question], cache)] if question else []
        return torch.cat([*out, *(step(model, more[:, question + n : question + n + 1], cache) for n in range(3))], 1)

    with patched(model, **METHODS[name]):
        first, second = after(3), after(4)
        assert_close("two answers taken back", first, second)
        assert_close("never given", first, after(None))


@torch.no_grad()
def test_act_says_that_a_rollback_is_not_neutral() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, PROMPT + ANSWER)
    with patched(model, **METHODS["act"]) as patch:
        cache = used(model, ids)
        assert "rolled back" not in str(patch.report())
        cache.crop(-3)
        step(model, ids[:, :1], cache)
        assert f"act: {len(patch.layers)} times a layer's cache was rolled back" in str(patch.report())


@pytest.mark.parametrize("name", ["quest", "dhsa in decode"])
@torch.no_grad()
def test_the_mask_hides_older_tokens_from_some_turn_on(name: str) -> None:
    """Rows begin elsewhere: what was worked out for the old beginning is dropped."""
    model = built("llama")
    ids = zoo.prompt(model, 2, PROMPT + ANSWER)
    seen, hidden = PROMPT + ANSWER, [25, 0]
    mask = torch.ones(2, seen + 1, dtype=torch.long)
    for row, n in enumerate(hidden):
        mask[row, :n] = 0
    more = zoo.prompt(model, 2, 1, seed=1)
    place = torch.full((2, 1), seen)
    with patched(model, **METHODS[name]) as patch:
        cache = used(model, ids)
        fresh = forgetful(cache)
        got, want = (step(model, more, c, attention_mask=mask, position_ids=place) for c in (cache, fresh))
        assert_close("hidden row", got[0], want[0])
        assert any("other than those remembered" in note for note in patch.report().notes)


@torch.no_grad()
def test_other_settings_do_not_take_over_what_these_remember() -> None:
    """Two patches in turns on one cache: each has its own memory."""
    model = built("llama")
    ids = zoo.prompt(model, 2, PROMPT + ANSWER)
    sparse = {"method": "flux", "sparse_layers": "0-", "sparse_settings": {"sink": 2, "window": 8}}
    dense = {**sparse, "sparse_layers": None}
    with patched(model, **sparse):
        cache = DynamicCache()
        step(model, ids[:, :PROMPT], cache)
    with patched(model, **dense) as patch:
        step(model, ids[:, PROMPT : PROMPT + 1], cache)
        assert patch.report().density("decode") == 1
    with patched(model, **sparse) as patch:
        step(model, ids[:, PROMPT + 1 : PROMPT + 2], cache)
        assert patch.report().density("decode") < 0.3


@torch.no_grad()
def test_a_static_cache_overwritten_by_hand() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, PROMPT)
    with patched(model, **QUEST) as patch:
        cache = StaticCache(model.config, max_cache_len=PROMPT + 8)
        step(model, ids, cache)
        step(model, ids[:, :1], cache)
        twin = copy.deepcopy(cache)
        step(model, ids[:, :1], twin)
        assert not any("by hand" in note for note in patch.report().notes)
        for layer in cache.layers:
            layer.keys[:, :, 8:16] = layer.keys[:, :, 16:24]
        want = copy.deepcopy(cache)
        for layer in want.layers:
            vars(layer).pop("hfpatch_states")
        assert_close("logits", step(model, ids[:, :1], cache), step(model, ids[:, :1], want))
        assert any("by hand" in note for note in patch.report().notes)
