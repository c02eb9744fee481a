"""The cache layer that has dropped keys: it copies, moves, shrinks and refuses as a whole cache under a mask would."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from eviction_helpers import SMALL, kept_layers, oracle, recorded, told
from eviction_helpers import toys as toys
from test_invariants import assert_close, built
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hfpatch import CacheError, UnsupportedModelError, patch_model, patched, unpatch_model
from hfpatch.runtime.cache_keep import check_croppable
from hfpatch.runtime.cache_state import FITS

pytestmark = pytest.mark.usefixtures("toys")
TOY: dict[str, Any] = {**SMALL, "budget": 9, "evict": "both"}
ONCE = {**TOY, "evict": "prompt", "interval": 20}
PROMPT, END = 30, 46
CUTS = [0, PROMPT, 31, 32]


def filled(model: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Any:
    """A cache that has dropped keys of a prompt and got two more since."""
    with patched(model, "toy-keep", **{**TOY, **settings}):
        return told(model, ids, CUTS, mask)[1]


def pickled(cache: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def moved(name: str, argument: Any) -> Callable[[Any], Any]:
    def move(cache: Any) -> Any:
        getattr(cache, name)(argument)
        return cache

    return move


MOVES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (moved("reorder_cache", torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (moved("batch_select_indices", torch.tensor([2, 1])), [2, 1]),
    "select by bool": (moved("batch_select_indices", torch.tensor([False, True, True])), [1, 2]),
    "repeat": (moved("batch_repeat_interleave", 2), [0, 0, 1, 1, 2, 2]),
    "deepcopy": (copy.deepcopy, [0, 1, 2]),
    "pickle": (pickled, [0, 1, 2]),
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("move", MOVES)
def test_a_cache_that_is_moved_goes_on_as_the_whole_one(move: str, padded: bool) -> None:
    model = built("llama")
    how, rows = MOVES[move]
    ids, mask = zoo.prompt(model, 3, END), torch.ones(3, END, dtype=torch.long)
    if padded:
        mask[1, :9], mask[2, :26] = 0, 0
    with patched(model, "toy-keep", **ONCE) as patch:
        original = told(model, ids, CUTS, mask)[1]
        cache, layers = how(original), patch.layers
        got, cache = told(model, ids[rows], [32, 33, 37, END], mask[rows], cache)
        if cache is not original:
            again, _ = told(model, ids[rows], [32, 33, 37, END], mask[rows], original)
            assert torch.equal(got, again), "the original goes on by itself"
    assert set(kept_layers(cache)) == set(layers)
    with recorded(model, "toy-keep", **ONCE) as (_, log):
        told(model, ids, CUTS, mask)
    with oracle(model, log, layers):
        want, _ = told(model, ids[rows], [32, 33, 37, END], mask[rows], how(told(model, ids, CUTS, mask)[1]))
    real = mask[rows, 32:].bool()
    assert_close("logits", got[real], want[real])


@pytest.mark.parametrize("back", [1, 3, 6])
@pytest.mark.parametrize("name", [n for n in ("llama", "deepseek_v3") if n in zoo.SUPPORTED])
def test_tokens_taken_back(name: str, back: int) -> None:
    """Two tokens have come since, five are protected: what is taken back is exact."""
    model = built(name)
    ids, other = zoo.prompt(model, 2, END), zoo.prompt(model, 2, END, seed=1)
    gone = -back if zoo.RELEASE > (5, 4) else 32 - back
    again = [32 - back, 33 - back, 37 - back, END]
    with recorded(model, "toy-keep", **{**TOY, "interval": 9}) as (patch, log):
        _, cache = told(model, ids, CUTS)
        cache.crop(gone)
        assert {layer.get_seq_length() for layer in cache.layers} == {32 - back}
        got, _ = told(model, other, again, cache=cache)
        layers = patch.layers
    assert max(len(events) for events in log.values()) == 2, "decode steps drop keys again"
    with oracle(model, log, layers):
        _, cache = told(model, ids, CUTS)
        cache.crop(gone)
        want, _ = told(model, other, again, cache=cache)
    assert_close("logits", got, want)


def test_what_is_remembered_of_keys_is_cut_to_those_left() -> None:
    """Row 1 has 12 tokens less than row 0, and both have dropped some: lengths are of the keys that each has left."""
    model = built("llama")
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, END), [END, END - 12])
    cache, told_of = filled(model, ids, mask, budget=14), {}

    class Memory:
        def __init__(self, row: int) -> None:
            self.row = row

        def crop(self, length: int) -> None:
            told_of[self.row] = length

    for layer in cache.layers:
        layer.hfpatch_states["toy"] = {(row,): {"m": Memory(row), FITS: (12 * row, 32)} for row in (0, 1)}
    cache.layers[0].crop(-3 if zoo.RELEASE > (5, 4) else 29)
    assert told_of == {0: 14 + 2 - 3, 1: 14 + 2 - 3}


def test_what_was_dropped_cannot_be_taken_back() -> None:
    model = built("llama")
    cache = filled(model, zoo.prompt(model, 2, END))
    with pytest.raises(CacheError, match="rolled back by 8 tokens"):
        cache.crop(-8 if zoo.RELEASE > (5, 4) else 24)
    cache.crop(-7 if zoo.RELEASE > (5, 4) else 25)
    with pytest.raises(CacheError, match="rolled back by 1 tokens"):
        cache.crop(-1 if zoo.RELEASE > (5, 4) else 24)
    assert all(layer.is_croppable for layer in cache.layers)
    with patched(model, "streaming", sink=2, window=5, crop_cache=True):
        _, cache = told(model, zoo.prompt(model, 2, END), CUTS)
    with pytest.raises(CacheError, match="use crop_cache=False"):
        cache.crop(-1 if zoo.RELEASE > (5, 4) else 31)
    assert not any(layer.is_croppable for layer in cache.layers)


def test_a_reset_cache_begins_anew() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, END)
    cache = filled(model, ids)
    cache.reset()
    if cache.get_seq_length(1):
        pytest.skip("this release of Transformers does not empty a cache by reset")
    want, _ = told(model, ids, CUTS)
    assert torch.equal(told(model, ids, CUTS, cache=cache)[0], want)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": zoo.VOCAB},
    "chunks": {"prefill_chunk_size": 7},
    "assisted": {"assistant_model": "another", "eos_token_id": zoo.VOCAB},
}


@pytest.mark.parametrize("how", HOW)
def test_generate_equals_the_oracle(how: str) -> None:
    model = built("llama")
    guessing = how in ("prompt lookup", "assisted")
    ids = zoo.prompt(model, 1, 10).repeat(1, 3) if guessing else zoo.prompt(model, 2, PROMPT)
    if how == "greedy":
        ids, mask = zoo.left_pad(zoo.prompt(model, 3, PROMPT), [PROMPT, 21, 3])
    else:
        mask = torch.ones_like(ids)
    asked = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, **HOW[how]}
    if how == "assisted":
        helper = zoo.SUPPORTED["llama-mha"].build()
        helper.generation_config.num_assistant_tokens = 3
        helper.generation_config.num_assistant_tokens_schedule = "constant"
        asked["assistant_model"] = helper
    with recorded(model, "toy-keep", **(ONCE if guessing else TOY)) as (patch, log):
        got, layers = model.generate(ids, **asked), patch.layers
    assert log
    with oracle(model, log, layers):
        assert torch.equal(got, model.generate(ids, **asked))
    assert not torch.equal(got, model.generate(ids, **asked)), "something was dropped"


def test_prompt_lookup_equals_greedy() -> None:
    """The prompt's last token is new to it, so that no guess comes with the prompt and counts when keys are chosen."""
    model = built("llama")
    ids = zoo.prompt(model, 1, 40)
    new = next(n for n in range(zoo.FIRST_PLAIN_ID, zoo.VOCAB) if n not in ids)
    ids = torch.cat([ids, torch.tensor([[new]])], 1)
    with patched(model, "toy-keep", **ONCE) as patch:
        asked = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": zoo.VOCAB}
        greedy = model.generate(ids, **asked)
        fast = model.generate(ids, **asked, prompt_lookup_num_tokens=3)
        assert any(line.phase == "chunk" for line in patch.report().lines), "some guesses"
    assert torch.equal(greedy, fast)


def test_only_the_method_that_dropped_keys_may_go_on() -> None:
    model = built("llama")
    ids, step = zoo.prompt(model, 2, END), zoo.prompt(model, 2, 1, seed=3)
    want = told(model, ids, CUTS)[0]
    for method, settings in ((None, {}), ("dense", {}), ("snapkv", {}), ("streaming", {"crop_cache": True})):
        cache = filled(model, ids)
        if method:
            patch_model(model, method, **settings)
        with pytest.raises(CacheError, match="cropped"), torch.no_grad():
            model(step, past_key_values=cache)
        unpatch_model(model) if method else None
    assert torch.equal(told(model, ids, CUTS)[0], want)
    with patched(model, "streaming", sink=2, window=5, crop_cache=True):
        _, cache = told(model, ids, CUTS)
    with (
        patched(model, "streaming", sink=2, window=8, crop_cache=True),
        pytest.raises(CacheError, match="another window"),
        torch.no_grad(),
    ):
        model(step, past_key_values=cache)
    cache = filled(model, ids)
    with patched(model, "toy-keep", **{**SMALL, "budget": 20}), torch.no_grad():
        model(step, past_key_values=cache)  # a set is a set, whatever the settings are now


def test_another_padding_and_keys_changed_by_hand_are_refused() -> None:
    model = built("llama")
    ids, mask = zoo.prompt(model, 2, END), torch.ones(2, END, dtype=torch.long)
    with patched(model, "toy-keep", **TOY), torch.no_grad():
        for start, stop in ((0, 4), (20, 30)):
            _, cache = told(model, ids, CUTS)
            other = mask[:, :33].clone()
            other[0, start:stop] = 0
            with pytest.raises(CacheError, match=r"another padding|dense attention"):
                model(ids[:, 32:33], past_key_values=cache, attention_mask=other)
        _, cache = told(model, ids, CUTS)
        cache.layers[1].keys = cache.layers[1].keys.flip(0)
        with pytest.raises(CacheError, match="by hand"):
            model(ids[:, 32:33], past_key_values=cache)


def test_caches_and_models_that_cannot_drop_keys_are_refused() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, PROMPT)
    with patched(model, "toy-keep", **TOY), torch.no_grad():
        for cache in (StaticCache(config=model.config, max_cache_len=64), DynamicCache(offloading=True)):
            with pytest.raises(
                (CacheError, RuntimeError, AssertionError), match=r"DynamicCache|CUDA|cuda|accelerator"
            ):
                model(ids, past_key_values=cache)
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    both.self_attention_cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    with pytest.raises(CacheError, match="EncoderDecoderCache"):
        check_croppable(both, 0, 0)
    plain = DynamicCache(config=model.config)
    plain.offloading = True
    with pytest.raises(CacheError, match="not with an offloaded DynamicCache"):
        check_croppable(plain, 0, 0)
    shared = zoo.SUPPORTED["llama"].build()
    shared.config.num_kv_shared_layers = 1
    for method in ("toy-keep", "streaming"):
        with pytest.raises(UnsupportedModelError, match="keys of others"):
            patch_model(shared, method, **({"crop_cache": True} if method == "streaming" else TOY))
