"""generate() under a patch: every cache, strategy and input form gives what full forward passes give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from test_invariants import assert_close, built, logits
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hfpatch import patched

NAMES = ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "gpt2", "cohere2"]
STREAMING: dict[str, Any] = {"method": "streaming", "sink": 2, "window": 8}
NEW = 6
LENGTH = 41
architectures = pytest.mark.parametrize("name", NAMES)
croppable = pytest.mark.parametrize("name", [n for n in NAMES if not zoo.SUPPORTED[n].hybrid])
patches = pytest.mark.parametrize("settings", [{"method": "dense"}, STREAMING], ids=["dense", "streaming"])


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """New tokens only `[B, NEW]`."""
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **{"do_sample": False, **kwargs})
    return out[:, ids.shape[1] :]


def skip_unless_unpatched_does(model: PreTrainedModel, ids: Tensor, **how: Any) -> None:
    """Skip where the installed release does not generate the greedy tokens in this way without any patch."""
    try:
        done = torch.equal(generate(model, ids, **how), generate(model, ids))
    except (AttributeError, TypeError, ValueError):
        done = False
    if not done:
        pytest.skip(f"this release of Transformers gives other tokens with {', '.join(how)}, unpatched")


def argmax_chain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Greedy tokens by one full forward pass each."""
    start = ids.shape[1]
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


@architectures
def test_greedy_equals_full_forwards(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, **STREAMING) as patch:
        got = generate(model, ids)
        assert patch.report().density("decode") < 0.5 and not patch.report().fallbacks()
        assert torch.equal(got, argmax_chain(model, ids))


@architectures
def test_caches_agree(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    with patched(model, **STREAMING) as patch:
        want = generate(model, ids)
        assert torch.equal(generate(model, ids, use_cache=False), want), "no cache"
        assert torch.equal(generate(model, ids, cache_implementation="static"), want), "static"
        if not zoo.SUPPORTED[name].hybrid:
            assert torch.equal(generate(model, ids, past_key_values=DynamicCache()), want), "plain dynamic"
        assert not patch.report().fallbacks()


@architectures
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_left_padded_rows_generate_as_alone(name: str, static: bool) -> None:
    model = built(name)
    lengths = [LENGTH, 25, 12]
    ids = zoo.prompt(model, len(lengths), LENGTH)
    batch, mask = zoo.left_pad(ids, lengths)
    cache = {"cache_implementation": "static"} if static else {}
    with patched(model, **STREAMING):
        got = generate(model, batch, attention_mask=mask, **cache)
        for row, n in enumerate(lengths):
            assert torch.equal(got[row], generate(model, ids[row : row + 1, :n])[0]), f"row {row}"


@croppable
def test_chunked_prefill_equals_one_shot(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    skip_unless_unpatched_does(model, ids, prefill_chunk_size=7)
    with patched(model, **STREAMING) as patch:
        want = generate(model, ids)
        for size in (7, 16):
            assert torch.equal(generate(model, ids, prefill_chunk_size=size), want), size
        assert not patch.report().fallbacks()
        assert any(line.phase == "chunk" and line.stats.calls for line in patch.report().lines)


@croppable
def test_prompt_lookup_equals_greedy(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 1, 9).repeat(1, 5)
    skip_unless_unpatched_does(model, ids, prompt_lookup_num_tokens=3)
    with patched(model, **STREAMING):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


def test_assisted_equals_greedy() -> None:
    model, helper = built("llama"), built("llama-mha")
    ids = zoo.prompt(model, 1, LENGTH)
    with patched(model, **STREAMING), patched(helper, "streaming", sink=1, window=4):
        assert torch.equal(generate(model, ids, assistant_model=helper), generate(model, ids))


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("strategy", ["beams", "beams with padding", "sampling"])
def test_searches_run_the_same_with_and_without_cache(name: str, strategy: str) -> None:
    model = built(name)
    batch, mask = zoo.left_pad(zoo.prompt(model, 2, LENGTH), [LENGTH, 20])
    if "padding" not in strategy:
        batch, mask = zoo.prompt(model, 2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    kwargs: dict[str, Any] = {"num_beams": 3} if "beams" in strategy else {"do_sample": True, "top_k": 20}
    out = []
    with patched(model, **STREAMING):
        for cached in (True, False):
            torch.manual_seed(3)
            out.append(generate(model, batch, attention_mask=mask, use_cache=cached, **kwargs))
    assert torch.equal(*out)


def next_turn(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of a second turn, from the cache of the first and from the whole text."""
    first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, zoo.prompt(model, 1, 5, seed=1)], 1)
    return generate(model, turn, past_key_values=first.past_key_values), generate(model, turn)


def two_questions(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of two questions, from copies of the prompt's cache and from the whole texts."""
    prefix = model(ids, use_cache=True).past_key_values
    got, want = [], []
    for seed in (1, 2):
        asked = torch.cat([ids, zoo.prompt(model, 1, 4, seed=seed)], 1)
        got.append(generate(model, asked, past_key_values=copy.deepcopy(prefix)))
        want.append(generate(model, asked))
    return torch.cat(got), torch.cat(want)


@architectures
@pytest.mark.parametrize("scene", [next_turn, two_questions], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_cache_goes_on_where_it_stopped(name: str, scene: Callable[..., tuple[Tensor, Tensor]]) -> None:
    model = built(name)
    ids = zoo.prompt(model, 1, LENGTH)
    if not torch.equal(*scene(model, ids)):
        pytest.skip("this release of Transformers gives other tokens unpatched")
    with patched(model, **STREAMING):
        assert torch.equal(*scene(model, ids))


@architectures
def test_a_dense_patch_changes_no_token(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, 30)
    batch, mask = zoo.left_pad(ids, [30, 17])
    ways: list[dict[str, Any]] = [
        {}, {"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False},
        {"input_ids": batch, "attention_mask": mask}, {"past_key_values": "dynamic"},
    ]  # fmt: skip

    def run(way: dict[str, Any]) -> Tensor:
        way = dict(way)
        if "past_key_values" in way:
            way["past_key_values"] = DynamicCache(config=model.config)
        torch.manual_seed(5)
        return generate(model, way.pop("input_ids", ids), **way)

    done = 0
    for way in ways:
        try:
            want = run(way)
        except (AttributeError, KeyError):  # not in this release
            continue
        with patched(model, "dense"):
            assert torch.equal(run(way), want), way
        done += 1
    assert done >= len(ways) - 2


@architectures
@patches
def test_inputs_embeds(name: str, settings: dict[str, Any]) -> None:
    model = built(name)
    ids = zoo.prompt(model, 2, LENGTH)
    embeds = model.get_input_embeddings()(ids).detach()
    with patched(model, **settings):
        got = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(got, generate(model, ids))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_static_cache_in_a_hand_written_loop(name: str) -> None:
    """Prefill, a chunk and single tokens into a larger static cache, left-padded."""
    model = built(name)
    lengths = [33, 20]
    batch, mask = zoo.left_pad(zoo.prompt(model, 2, 33), lengths)
    with patched(model, **STREAMING) as patch, torch.no_grad():
        want = model(batch, attention_mask=mask).logits
        cache = StaticCache(model.config, max_cache_len=64)
        got, start = [], 0
        for stop in (20, 27, 28, 29, 33):
            pos = zoo.positions(mask)[:, start:stop]
            step = model(batch[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, position_ids=pos)
            got.append(step.logits)
            start = stop
        assert not patch.report().fallbacks()
    for row in range(2):
        real = mask[row].bool()
        assert_close(f"row {row}", torch.cat(got, 1)[row][real], want[row][real])


@architectures
def test_batch_of_three_equals_batches_of_one(name: str) -> None:
    model = built(name)
    ids = zoo.prompt(model, 3, LENGTH)
    with patched(model, **STREAMING):
        together = logits(model, ids)
        for row in range(3):
            assert_close(f"row {row}", together[row], logits(model, ids[row : row + 1])[0])
