"""Decode steps in one graph of torch.compile on a static cache: the tokens and logits of the uncompiled patch."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from injection_helpers import fresh
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from hfpatch import patched
from hfpatch.config.registry import make_config
from hfpatch.core.call import AttentionCall
from hfpatch.core.reweight import Columns
from hfpatch.core.selection import Selection
from hfpatch.methods.gated import Gated, GatedConfig
from hfpatch.methods.quest import Quest, QuestConfig

LENGTH, STEPS, SLOTS = 60, 20, 96
QUEST = {"page": 4, "min_length": 0}
DHSA = {
    "boundaries": "novelty", "budget": 32, "sink": 4, "local": 4, "block_q": 8, "chunk": 3, "longest": 8, "radius": 1,
    "close_after": 7,
}  # fmt: skip
PATCHES: dict[str, list[Any]] = {
    "streaming": [("streaming", {"sink": 2, "window": 16})],
    "streaming wider than the cache": [("streaming", {"sink": 2, "window": 95})],
    "quest": [("quest", {"budget": 24, **QUEST})],
    "quest per head": [("quest", {"budget": 24, "head_sharing": "head", **QUEST})],
    "quest for all heads": [("quest", {"budget": 24, "head_sharing": "all", **QUEST})],
    "quest, a share": [("quest", {"budget": 0.3, **QUEST})],
    "quest, dense at first": [("quest", {"budget": 24, "page": 4, "min_length": 70})],
    "quest, dense throughout": [("quest", {"budget": 24, "page": 4})],
    "quest beside dense layers": [("quest", {"budget": 24, "dense_layers": 1, **QUEST})],
    "quest, dense until the end": [("quest", {"budget": 24, "page": 4, "min_length": 79})],
    "dhsa": [("dhsa", DHSA)],
    "dhsa, one choice, fixed chunks": [("dhsa", {**DHSA, "head_sharing": "all", "boundaries": "fixed", "chunk": 4})],
    "dhsa in decode alone": [("dhsa", {**DHSA, "phase": "decode"})],
    "dhsa, a share in blocks": [("dhsa", {**DHSA, "budget": 0.4, "align": 4, "block_q": 8})],
    "dhsa, dense at first": [("dhsa", {**DHSA, "decode_min_length": 70, "phase": "decode"})],
    "dhsa, a budget of its own": [("dhsa", {**DHSA, "decode_budget": 20})],
    "dhsa as it is": [("dhsa", {"score": "mean", "decode_min_length": 100, "budget": 256})],
    "zerotuning": [("zerotuning", {"gamma": 3.0})],
    "zerotuning of some heads": [("zerotuning", {"gamma": 0.2, "heads": [0, 3]})],
    "gated": [("gated", {"form": "sigmoid", "start_bias": 1.0})],
    "head_scale": [("head_scale", {"heads": [[0, 0], [1, 3]]})],
    "quest under a window, with all the rest": [
        ("streaming", {"sink": 2, "window": 40}), ("quest", {"budget": 24, **QUEST}), ("zerotuning", {"gamma": 3.0}),
        ("head_scale", {"heads": [[1, 0]]}),
    ],
}  # fmt: skip
DENSE = {"streaming wider than the cache", "quest, dense throughout", "dhsa as it is"}


def decoded(model: PreTrainedModel, step: Callable[..., Any], padded: bool) -> tuple[Tensor, Tensor]:
    """Greedy tokens and logits of decode steps by `step`, after a prompt that the model itself reads."""
    rows = 2 if padded else 1
    ids, mask = zoo.left_pad(zoo.prompt(model, rows, LENGTH), [LENGTH, LENGTH - 13][:rows])
    cache = StaticCache(model.config, max_cache_len=SLOTS)
    whole = torch.cat([mask, mask.new_ones(rows, STEPS)], 1)
    more = {"attention_mask": mask, "position_ids": zoo.positions(mask)} if padded else {}
    token = model(ids, past_key_values=cache, **more).logits[:, -1:].argmax(-1)
    tokens, logits = [token], []
    for t in range(LENGTH, LENGTH + STEPS):
        if padded:  # a mask and positions that look the same in every step
            seen = torch.nn.functional.pad(whole[:, : t + 1], (0, SLOTS - t - 1))
            more = {"attention_mask": seen, "position_ids": zoo.positions(seen)[:, t : t + 1].clone()}
        out = step(token, past_key_values=cache, **more).logits
        token = out.argmax(-1)
        tokens.append(token)
        logits.append(out)
    return torch.cat(tokens, 1), torch.cat(logits, 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def as_in_a_graph(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward pass, taking the ways that it takes when it is compiled, but run at once."""

    def step(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(torch.compiler, "is_compiling", lambda: True)
            return model(*args, **kwargs)

    return step


def compiled(model: PreTrainedModel, backend: Any = "eager") -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend)  # type: ignore[no-any-return]


def make(methods: list[Any]) -> list[Any]:
    return [make_config(*m) for m in methods]


def check(name: str, patch: str, padded: bool, way: Callable[[PreTrainedModel], Callable[..., Any]]) -> None:
    """Steps made `way` give what the patched model gives, which is another thing than the model alone gives."""
    model = fresh(name, **({"num_hidden_layers": 2} if name in ("llama", "qwen3") else {}))
    with torch.no_grad():
        _, dense = decoded(model, model, padded)
        with patched(model, make(PATCHES[patch])) as handle:
            tokens, logits = decoded(model, model, padded)
            assert torch.allclose(dense, logits, atol=1e-4) == (patch in DENSE)
            assert "one graph" not in str(handle.report())
            got, near = decoded(model, way(model), padded)
            assert "one graph are not counted" in str(handle.report())
    assert torch.equal(got, tokens)
    torch.testing.assert_close(near, logits, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_step_in_a_graph_equals_one_outside(name: str, patch: str, padded: bool) -> None:
    check(name, patch, padded, as_in_a_graph)


@pytest.mark.parametrize("patch", ["streaming", "quest", "dhsa", "zerotuning"])
@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_sinks_and_a_soft_cap_are_kept(name: str, patch: str) -> None:
    check(name, patch, True, as_in_a_graph)


@pytest.mark.parametrize("patch", ["streaming", "gated", "quest under a window, with all the rest", "dhsa"])
def test_it_is_one_graph_and_compiled_once(patch: str) -> None:
    counter = CompileCounter()
    check("llama", patch, True, lambda model: compiled(model, counter))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("patch", ["streaming", "quest", "quest under a window, with all the rest", "dhsa", "gated"])
def test_it_compiles_with_every_backend(patch: str, padded: bool, backend: str) -> None:
    check("qwen3", patch, padded, lambda model: compiled(model, backend))


@pytest.mark.parametrize("patch", ["quest", "dhsa"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_steps_inside_and_outside_of_a_graph_alternate(patch: str, padded: bool) -> None:
    model = fresh(num_hidden_layers=2)
    with patched(model, make(PATCHES[patch])) as handle:
        inside = as_in_a_graph(model)
        _, want = decoded(model, inside, padded)
        turns = itertools.cycle([model, inside, inside])
        _, got = decoded(model, lambda *args, **kwargs: next(turns)(*args, **kwargs), padded)
        assert not any("by hand" in note for note in handle.report().notes)
    if patch == "quest":  # chunks of dhsa are closed later by those who have not seen every step
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)
    assert got.isfinite().all()


@torch.no_grad()
def read(model: PreTrainedModel, rows: int = 2) -> tuple[StaticCache, Tensor]:
    """A static cache with a prompt, and tokens to go on with."""
    cache = StaticCache(model.config, max_cache_len=SLOTS)
    model(zoo.prompt(model, rows, LENGTH), past_key_values=cache)
    return cache, zoo.prompt(model, rows, 4)


@pytest.mark.parametrize("patch", ["quest", "dhsa"])
@torch.no_grad()
def test_what_was_left_follows_the_rows(patch: str) -> None:
    model = fresh(num_hidden_layers=2)
    with patched(model, make(PATCHES[patch])):
        cache, ids = read(model)
        turned, _ = read(model)
        turned.reorder_cache(torch.tensor([1, 0]))
        want = as_in_a_graph(model)(ids[:, :1], past_key_values=cache).logits
        got = as_in_a_graph(model)(ids.flip(0)[:, :1], past_key_values=turned).logits
        torch.testing.assert_close(got.flip(0), want, atol=2e-5, rtol=2e-4)


def other(model: PreTrainedModel, cache: Any, ids: Tensor) -> None:
    """A prompt of which the patch was not told."""
    with patched(model, "dense"):
        model(ids, past_key_values=cache)


@pytest.mark.parametrize("spoil", [other, lambda model, cache, ids: cache.reset()])
@torch.no_grad()
def test_steps_on_keys_that_the_patch_has_not_seen_are_refused(spoil: Callable[..., None]) -> None:
    model = fresh(num_hidden_layers=1)
    with patched(model, make(PATCHES["quest"])):
        cache, ids = read(model)
        spoil(model, cache, ids)
        with pytest.raises(Unsupported, match="was not processed by the patched model outside of a graph"):
            compiled(model)(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "methods,static,queries,why",
    [
        ([("quest", QUEST)], False, 1, "quest: it decodes in a graph with a StaticCache alone"),
        ([("quest", QUEST)], True, 3, "3 tokens at once"),
        ([("act", {})], True, 1, "act: its decode step has no form of fixed shapes; leave fullgraph=True out"),
        ([("dhsa", {**DHSA, "score": "mean"})], True, 1, "dhsa: score='mean' has no form of fixed shapes"),
        ([("quest", {"budget": 24, **QUEST}), ("dhsa", DHSA)], True, 1, "two methods that choose keys"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_compiled_is_refused_with_a_reason(
    methods: list[Any], static: bool, queries: int, why: str
) -> None:
    model = fresh(num_hidden_layers=1)
    with patched(model, make(methods)):
        cache, ids = read(model)
        if not static:
            cache = DynamicCache(config=model.config)
            model(zoo.prompt(model, 2, LENGTH), past_key_values=cache)
        with pytest.raises(Unsupported, match=re.escape(why)):
            compiled(model)(ids[:, :queries], past_key_values=cache)


def test_a_choice_changed_in_a_subclass_is_not_compiled_as_it_was() -> None:
    class Other(Quest):
        def select(self, call: AttentionCall) -> Selection | None:
            return None

    class Choosy(Gated):
        def select(self, call: AttentionCall) -> Selection | None:
            return None

    assert Quest(QuestConfig()).graph_blocker(SLOTS) is None and Gated(GatedConfig()).graph_blocker(SLOTS) is None
    assert Other(QuestConfig()).graph_blocker(SLOTS) and Choosy(GatedConfig()).graph_blocker(SLOTS)


def test_factors_find_their_columns() -> None:
    at, factor = torch.arange(6).view(1, 2, 3), torch.tensor([2.0, 3.0])
    for keys in (slice(1, 3), torch.tensor([2, 1])):
        columns = Columns(keys, factor, positive=True)
        assert columns.among(at).flatten().tolist() == [False, True, True, False, False, False]
        assert torch.equal(columns.head_logs, factor.log())


@pytest.mark.slow
@torch.no_grad()
def test_without_fullgraph_such_a_step_runs_outside_of_the_graph() -> None:
    model = fresh(num_hidden_layers=1)
    with patched(model, make([("dhsa", {**DHSA, "score": "mean"})])) as handle:
        cache, ids = read(model)
        want = model(ids[:, :1], past_key_values=cache).logits
        cache, ids = read(model)
        got = torch.compile(model, backend="eager")(ids[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)
        assert "one graph" not in str(handle.report())


@torch.no_grad()
def test_a_step_that_has_to_be_dense_says_so() -> None:
    model = fresh(num_hidden_layers=1)
    with patched(model, make(PATCHES["quest"])) as handle:
        cache, ids = read(model)
        as_in_a_graph(model)(ids[:, :1], past_key_values=cache, output_attentions=True)
        assert "in such a graph 1 layers run dense: attention weights were asked for" in str(handle.report())


@pytest.mark.parametrize("patch", ["quest", "dhsa"])
@torch.no_grad()
def test_generate_compiles_its_steps(patch: str) -> None:
    model = fresh(num_hidden_layers=2)
    ids, mask = zoo.left_pad(zoo.prompt(model, 2, LENGTH), [LENGTH, LENGTH - 13])
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True  # on a CPU it would not compile
    with patched(model, make(PATCHES[patch])) as handle:
        want = model.generate(ids, **asked)
        assert "one graph" not in str(handle.report())
        got = model.generate(ids, compile_config=how, **asked)
        assert "one graph are not counted" in str(handle.report())
    assert torch.equal(got, want)
