"""What every method that drops keys must keep: logits of a whole cache under a mask, rows as alone, bytes."""

import gc
import itertools
from typing import Any

import pytest
import torch
import zoo
from eviction_helpers import SMALL, kept_layers, oracle, recorded, stored, told
from eviction_helpers import toys as toys
from methods_list import EVICTING, MethodCase
from test_invariants import assert_close, built
from torch import Tensor
from transformers import DynamicCache

from hfpatch import CacheError, UnsupportedModelError, list_methods, patch_model, patched
from hfpatch.config.registry import get_method
from hfpatch.core.evicting import Evicting

pytestmark = pytest.mark.usefixtures("toys")
CASES: dict[str, dict[str, Any]] = {
    "toy-keep": {**SMALL, "budget": 9, "evict": "both"},
    **{str(case): case.settings for case in EVICTING},
}
REFUSED = {"toy-keep": (), **{str(case): case.refused for case in EVICTING}}
FAST = ("llama", "gemma2", "gpt_oss", "deepseek_v3", "qwen2_vl")
LENGTHS, END = [40, 26, 6], 60
CUTS = [0, 40, 41, 42, 43, 44, 45, 46, 49, 50, 51, 58, 59, END]


def test_every_method_that_drops_keys_is_here() -> None:
    found = {n for n in list_methods() if issubclass(get_method(n), Evicting) and not n.startswith("toy")}
    assert found == {case.name for case in EVICTING}


def pairs() -> pytest.MarkDecorator:
    found = [
        pytest.param(tiny, case, id=f"{tiny.name}-{case}", marks=() if tiny.name in FAST else pytest.mark.slow)
        for tiny in zoo.SUPPORTED.values()
        for case in CASES
        if not tiny.all_sliding and tiny.name != "falcon_h1" and tiny.name not in REFUSED[case]
    ]
    return pytest.mark.parametrize("tiny,case", found)


def cuts_of(tiny: zoo.TinyModel) -> list[int]:
    """Where calls end; hybrid models take single tokens alone after a prompt."""
    return [0, *range(40, END + 1)] if tiny.hybrid else CUTS


def batch_of(model: Any) -> tuple[Any, Any, Any]:
    """Token ids of three rows, the first `LENGTHS` of which are prompts padded at the left; and their mask."""
    ids = zoo.prompt(model, 3, END)
    batch, mask = zoo.left_pad(ids, LENGTHS)
    later = ids[:, : END - max(LENGTHS)]
    return ids, torch.cat([batch, later], 1), torch.cat([mask, torch.ones_like(later)], 1)


@pairs()
def test_equals_a_whole_cache_under_its_mask(tiny: zoo.TinyModel, case: str) -> None:
    model = built(tiny.name)
    _, batch, mask = batch_of(model)
    with recorded(model, case, **CASES[case]) as (patch, log):
        got, cache = told(model, batch, cuts_of(tiny), mask)
        assert not patch.report().fallbacks()
        layers = patch.layers
    dense, whole = told(model, batch, CUTS[:2], mask)
    real = mask[:, :40].bool()
    assert torch.equal(got[:, :40][real], dense[real]), "the call that drops keys is dense itself"
    assert len(log) == len({rows for _, rows in log}) * len(layers)
    assert max(len(events) for events in log.values()) > 1, "decode steps drop keys too"
    with oracle(model, log, layers):
        want, whole = told(model, batch, cuts_of(tiny), mask)
    real = mask.bool()
    assert_close("logits", got[real], want[real])
    assert set(kept_layers(cache)) == set(layers)
    for small, large in ((cache.layers[n], whole.layers[n]) for n in layers):
        assert small.get_seq_length() == large.get_seq_length() == END
        assert cache.get_mask_sizes(3, 0) == whole.get_mask_sizes(3, 0) if zoo.RELEASE > (5, 4) else True


def check_rows(model: Any, case: str, cuts: list[int]) -> None:
    _, batch, mask = batch_of(model)
    with recorded(model, case, **CASES[case]) as (_, log):
        together, _ = told(model, batch, cuts, mask)
    for row in (1, 2):
        start = 40 - LENGTHS[row]
        with recorded(model, case, **CASES[case]) as (_, own):
            alone, _ = told(model, batch[row : row + 1, start:], [0, *(n - start for n in cuts[1:])])
        assert_close(f"row {row}", together[row, start:], alone[0])
        for (layer, _), events in own.items():
            for (at, kept), (same, other) in zip(events, log[layer, (row,)], strict=True):
                assert at == same and torch.equal(kept, other)


@pairs()
def test_padded_rows_keep_what_they_keep_alone(tiny: zoo.TinyModel, case: str) -> None:
    check_rows(built(tiny.name), case, cuts_of(tiny))


@pytest.mark.parametrize("case", CASES)
def test_rows_that_drop_keys_at_other_steps_leave_each_other_alone(case: str) -> None:
    check_rows(built("llama"), case, [0, *range(40, END + 1)])


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_budget_and_interval(case: str) -> None:
    model = built("deepseek_v3" if case == "keydiff" else "llama")
    ids = zoo.prompt(model, 2, END)
    settings = {**CASES[case], "layers_budget": "uniform"}
    with patched(model, case, **settings):
        _, cache = told(model, ids, CUTS[:2])
        for n, layer in kept_layers(cache).items():
            own = settings["budget"] + (2 * n if case == "toy-keep" else 0)
            rows, heads, keys, size = layer.keys.shape
            assert keys == own
            room = own + settings["interval"]
            assert stored(layer) == rows * heads * room * (size + layer.values.shape[3]) * layer.keys.element_size()
            before = stored(layer), layer.keys.data_ptr()
        told(model, ids, CUTS[1:5], cache=cache)
        assert (stored(layer), layer.keys.data_ptr()) == before, "new keys go into the room there is"


@pytest.mark.parametrize("case", CASES)
def test_a_budget_that_is_not_exceeded_changes_nothing(case: str) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, END)
    want, _ = told(model, ids, CUTS)
    for budget in (END, 1.0):
        with patched(model, case, **{**CASES[case], "budget": budget}):
            got, cache = told(model, ids, CUTS)
        assert not kept_layers(cache)
        assert_close("logits", got, want)


@pytest.mark.parametrize("name", [n for n in FAST if n in zoo.SUPPORTED])
def test_streaming_drops_what_no_query_sees(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, END)
    cuts = [0, 6, 12, 18, 40, 41, 42, 47, 59, END]
    with patched(model, "streaming", sink=2, window=8):
        want, _ = told(model, ids, cuts)
    with patched(model, "streaming", sink=2, window=8, crop_cache=True) as patch:
        _, cache = told(model, ids, cuts[:3])
        assert all(layer.keys.shape[2] == 9 for layer in kept_layers(cache).values()), "a prompt in chunks"
        got, cache = told(model, ids, cuts)
        assert not patch.report().fallbacks()
    assert_close("logits", got, want)
    assert set(kept_layers(cache)) == set(patch.layers) and cache.get_seq_length(patch.layers[0]) == END
    assert all(layer.keys.shape[2] == 9 for layer in kept_layers(cache).values())


def test_a_row_that_begins_in_a_later_chunk() -> None:
    """A prompt in chunks, left-padded: one row has not begun when the others drop keys."""
    model = built("llama")
    ids = zoo.prompt(model, 2, END)
    batch, mask = zoo.left_pad(ids, [END, 24])
    cuts = [0, 20, 30, 40, 41, 50, END]
    for case, settings in (*CASES.items(), ("streaming", {"sink": 2, "window": 8, "crop_cache": True})):
        with patched(model, case, **settings):
            got, cache = told(model, batch, cuts, mask)
            assert len(kept_layers(cache)) == 3
            want, _ = told(model, batch[1:, 36:], [0, 4, 5, 14, 24])
        assert_close(case, got[1, 36:], want[0])


def test_a_kept_suffix_is_the_suffix_alone() -> None:
    """With relative positions and one layer, a window without sinks gives what the last tokens give by themselves."""
    config = {**zoo.SUPPORTED["llama"].config, "num_hidden_layers": 1}
    model = zoo.TinyModel("one", "LlamaForCausalLM", "LlamaConfig", config, gqa=4).build()
    ids = zoo.prompt(model, 1, END)
    with patched(model, "streaming", sink=0, window=8, crop_cache=True):
        got, _ = told(model, ids, CUTS)
    for n in (39, 45, 53, END - 1):
        with torch.no_grad():
            want = model(ids[:, n - 7 : n + 1]).logits[:, -1]
        assert_close(f"query {n}", got[:, n], want)


@pytest.mark.parametrize("case", ["toy-keep", "keydiff", "expected"])
def test_a_prompt_in_chunks_is_never_held_whole(case: str) -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, END)
    settings = {**CASES[case], "layers_budget": "uniform"}
    with recorded(model, case, **settings) as (patch, log):
        cuts = [*range(0, END, 10), END]
        cache = DynamicCache(config=model.config)
        got, largest = [], 0
        for a, b in itertools.pairwise(cuts):
            part, _ = told(model, ids, [a, b], cache=cache)
            got.append(part)
            largest = max(largest, *(layer.keys.shape[2] for layer in cache.layers))
        layers = patch.layers
    assert largest <= settings["budget"] + 4
    with oracle(model, log, layers):
        want, _ = told(model, ids, cuts)
    assert_close("logits", torch.cat(got, 1), want)


def test_the_report_says_what_was_kept_and_when_nothing_was() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 2, END)
    with patched(model, "keydiff", **{**CASES["keydiff"], "layers_budget": "uniform"}) as patch:
        assert "keydiff" not in "".join(patch.report().notes)
        told(model, ids, CUTS[:2])
        assert patch.report().notes == ["keydiff: the last cache holds 30.0% of 40 tokens' keys"]
        told(model, ids, [0, 11])
        assert patch.report().notes == ["keydiff has dropped NOTHING: the last cache holds the keys of all 11 tokens"]
        told(model, ids, CUTS[:2])
        with torch.no_grad():
            model(ids[:, :17], output_attentions=True)
        nothing = "keydiff has dropped NOTHING: the last cache holds the keys of all 17 tokens"
        assert patch.report().fallbacks() and nothing in patch.report().notes, "a dense call drops none"
        patch.reset_report()
        assert not patch.report().notes
    with patched(model, "toy-keep", **CASES["toy-keep"]) as patch:
        told(model, ids, CUTS[:2])
        assert patch.report().notes[0].endswith("keys (0: 22.5%, 1: 27.5%, 2: 32.5%)")
    with patched(model, "streaming", sink=2, window=7, crop_cache=True) as patch:
        told(model, ids, CUTS[:2])
        assert patch.report().notes == ["streaming: the last cache holds 20.0% of 40 tokens' keys"]


@pytest.mark.skipif("falcon_h1" not in zoo.SUPPORTED, reason="this release does not have the model")
def test_a_layer_that_holds_more_than_keys_is_refused() -> None:
    model = built("falcon_h1")
    with patched(model, "toy-keep", **CASES["toy-keep"]), pytest.raises(CacheError, match="with a plain DynamicCache"):
        told(model, zoo.prompt(model, 1, END), CUTS[:2])


@pytest.mark.parametrize("case", [case for case in EVICTING if case.refused], ids=str)
def test_models_without_what_a_method_needs_are_refused(case: MethodCase) -> None:
    for name in (n for n in case.refused if n in zoo.SUPPORTED):
        with pytest.raises(UnsupportedModelError, match=r"; use"):
            patch_model(built(name), case.name, **case.settings)


def test_caches_of_all_sizes_leave_nothing_behind() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor and x.ndim == 4 for x in gc.get_objects())

    model = built("llama")
    before = alive()
    with patched(model, "snapkv", **CASES["snapkv"]) as patch:
        for n in range(5):
            ids = zoo.prompt(model, 1 + n % 3, 14 + 5 * (n % 4))
            model.generate(ids, max_new_tokens=6 + n % 5, do_sample=False, num_beams=1 + n % 2)
            assert alive() == before
        assert "last cache holds" in str(patch.report())
