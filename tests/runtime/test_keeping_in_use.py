"""Patches on a cache that has dropped keys: what may act beside it, rows that end, gradients, what stays alive."""

import gc
import itertools
from typing import Any

import pytest
import torch
import zoo
from eviction_helpers import SMALL, ToyKeep, kept_layers, told
from eviction_helpers import toys as toys
from test_invariants import assert_close, built
from torch import Tensor
from torch._dynamo.exc import Unsupported
from transformers import DynamicCache

from hfpatch import IncompatibleMethodsError, patch_model, patched
from hfpatch.config.registry import make_config
from hfpatch.core.places import Places
from hfpatch.runtime.cache_keep import KeptLayer

pytestmark = pytest.mark.usefixtures("toys")
TOY: dict[str, Any] = {**SMALL, "budget": 9, "evict": "both"}
PROMPT, END = 30, 46
CUTS = [0, PROMPT, 31, 32]


def test_methods_that_go_by_positions_are_refused_beside_it() -> None:
    model = built("llama")
    keep = make_config("toy-keep", TOY)
    for other in ("streaming", "pattern", "vertical_slash", "act", "snapkv"):
        with pytest.raises(IncompatibleMethodsError, match="different `layers`"):
            patch_model(model, [keep, other])
    with pytest.raises(IncompatibleMethodsError, match="first token"):
        patch_model(model, [make_config("toy-keep", {**TOY, "sink": 0}), make_config("zerotuning", {})])
    with patched(model, [keep, "zerotuning", "quest", "block_topk"]):
        assert kept_layers(told(model, zoo.prompt(model, 1, END), CUTS)[1])


@pytest.mark.parametrize(
    "evict,cuts", [("both", [0, 30, *range(31, 40)]), ("decode", [0, 30, 31, 67, *range(68, 72)])]
)
def test_quest_chooses_among_what_is_left_and_begins_anew_after_a_drop(evict: str, cuts: list[int]) -> None:
    """What it remembers of keys gives what it would find anew, also when tokens are taken back.

    A chunk of 36 tokens leaves more keys than there were before the drop: their number does not tell it.
    """
    model = built("llama")
    ids, other = zoo.prompt(model, 2, 80), zoo.prompt(model, 2, 80, seed=1)
    quest = make_config("quest", {"min_length": 0, "budget": 8, "page": 2})

    def run(forget: bool) -> Tensor:
        cache, parts = DynamicCache(config=model.config), []
        for tokens, steps in ((ids, cuts), (other, range(cuts[-1] - 4, cuts[-1] + 8))):
            for a, b in itertools.pairwise(steps):
                for layer in cache.layers if forget else ():
                    vars(layer).get("hfpatch_states", {}).clear()
                parts.append(told(model, tokens, [a, b], cache=cache)[0])
            cache.crop(-4 if zoo.RELEASE > (5, 4) else cache.get_seq_length() - 4)
        return torch.cat(parts, 1)

    with patched(model, [make_config("toy-keep", {**TOY, "budget": 16, "evict": evict}), quest]) as patch:
        got = run(False)
        assert patch.report().density("decode") < 10 / PROMPT
        assert_close("logits", got, run(True))


def test_sets_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("llama")
    for index in (
        torch.ones(1, 5).long(),
        torch.ones(1, 3, 5).long(),
        torch.ones(2, 1, 5).long(),
        torch.ones(1, 1, 5),
    ):
        monkeypatch.setattr(ToyKeep, "_retain", lambda self, call, index=index: Places(index))
        with (
            patched(model, "toy-keep", **TOY),
            pytest.raises(IncompatibleMethodsError, match="give whole numbers"),
        ):
            told(model, zoo.prompt(model, 1, PROMPT), CUTS[:2])


def test_rows_that_end_keep_their_keys_until_they_go_on() -> None:
    """Right padding: a prompt keeps all its keys; questions of several lengths follow one that dropped some."""
    model = built("llama")
    ids = zoo.prompt(model, 3, END)
    batch, mask = zoo.right_pad(ids, [END, 40, 20])
    with patched(model, "toy-keep", **TOY), torch.no_grad():
        assert not kept_layers(told(model, batch, [0, END], mask)[1])
        cache = model(ids[:1, :PROMPT], use_cache=True).past_key_values
        cache.batch_repeat_interleave(3)
        asked, mask = zoo.right_pad(torch.cat([ids[:1].expand(3, -1)[:, :PROMPT], ids[:, PROMPT:]], 1), [END, 40, 33])
        got = model(asked[:, PROMPT:], attention_mask=mask, past_key_values=cache).logits
        assert {layer.keys.shape[2] for layer in kept_layers(cache).values()} == {n + 16 for n in (9, 11, 13)}
        for row, stop in enumerate((END, 40, 33)):
            want, _ = told(model, torch.cat([ids[:1, :PROMPT], ids[row : row + 1, PROMPT:]], 1), [0, PROMPT, stop])
            assert_close(f"row {row}", got[row, : stop - PROMPT], want[0, PROMPT:])


def test_a_step_that_a_row_sits_out_drops_nothing_of_it() -> None:
    model = built("llama")
    ids, mask = zoo.prompt(model, 2, END), torch.ones(2, 31, dtype=torch.long)
    mask[1, 30] = 0
    with patched(model, "toy-keep", **{**TOY, "evict": "decode"}):
        _, cache = told(model, ids, [0, PROMPT])
        with torch.no_grad():
            model(ids[:, 30:31], attention_mask=mask, past_key_values=cache)
    assert not kept_layers(cache)


def test_gradients_flow_and_modes_may_change() -> None:
    model = zoo.SUPPORTED["llama"].build()
    ids = zoo.prompt(model, 2, END)
    with patched(model, "toy-keep", **{**TOY, "interval": 9}):
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        for n in range(PROMPT, PROMPT + 3):
            out = model(ids[:, n : n + 1], past_key_values=cache).logits
        out.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        want, _ = told(model, ids, [0, PROMPT, 31, 32])
        with torch.inference_mode():
            cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        got, _ = told(model, ids, [PROMPT, 31, 32], cache=cache)
        assert torch.equal(got, want[:, PROMPT:])


def test_nothing_of_the_whole_prompt_stays_alive() -> None:
    model = built("llama")
    ids = zoo.prompt(model, 1, 53)
    with patched(model, "toy-keep", **TOY), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    gc.collect()
    whole = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.ndim == 4 and 53 in x.shape]
    assert not whole and len(kept_layers(cache)) == 3
    assert all(isinstance(layer, KeptLayer) for layer in cache.layers)


@pytest.mark.parametrize(
    "method,settings",
    [
        ("snapkv", {"sink": 2, "window": 5, "budget": 20}),
        ("streaming", {"sink": 2, "window": 18, "crop_cache": True}),
    ],
)
@torch.no_grad()
def test_a_cache_that_has_dropped_keys_is_refused_with_a_reason_or_served_outside(
    method: str, settings: dict[str, Any]
) -> None:
    """Wherever in the call the graph ends, one without `fullgraph` gives what the uncompiled patch does."""
    model = built("llama")
    ids = zoo.prompt(model, 2, PROMPT)
    torch._dynamo.reset()
    with patched(model, make_config(method, settings)):
        whole, caches = torch.compile(model, backend="eager"), [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            model(ids, past_key_values=cache)
        with pytest.raises(Unsupported, match="this cache has dropped keys"):
            torch.compile(model, backend="eager", fullgraph=True)(ids[:, :1], past_key_values=caches[0])
        caches[0] = DynamicCache(config=model.config)
        model(ids, past_key_values=caches[0])
        for n in range(2):
            got, want = (
                m(ids[:, n : n + 1], past_key_values=c).logits for m, c in zip((whole, model), caches, strict=True)
            )
            assert_close("logits", got, want)
