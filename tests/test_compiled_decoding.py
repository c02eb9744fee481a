"""Decode steps in one graph of torch.compile on a static cache: the tokens and logits of the uncompiled patch."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from injection_helpers import fresh
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel, StaticCache

from hfpatch import patched
from hfpatch.config.registry import make_config

LENGTH, STEPS, SLOTS = 60, 20, 96
QUEST = {"page": 4, "min_length": 0}
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
    "zerotuning": [("zerotuning", {"gamma": 3.0})],
    "zerotuning of some heads": [("zerotuning", {"gamma": 0.2, "heads": [0, 3]})],
    "gated": [("gated", {"form": "sigmoid", "start_bias": 1.0})],
    "head_scale": [("head_scale", {"heads": [[0, 0], [1, 3]]})],
    "quest under a window, with all the rest": [
        ("streaming", {"sink": 2, "window": 40}), ("quest", {"budget": 24, **QUEST}), ("zerotuning", {"gamma": 3.0}),
        ("head_scale", {"heads": [[1, 0]]}),
    ],
}  # fmt: skip


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


def check(name: str, methods: list[Any], padded: bool, backend: Any) -> str:
    """Compare the compiled model with the model itself; the report."""
    model = fresh(name, num_hidden_layers=2)
    with torch.no_grad(), patched(model, [make_config(*m) for m in methods]) as patch:
        tokens, logits = decoded(model, model, padded)
        assert "one graph" not in str(patch.report())
        got, near = decoded(model, torch.compile(model, fullgraph=True, backend=backend), padded)
        assert torch.equal(got, tokens)
        torch.testing.assert_close(near, logits, atol=2e-5, rtol=2e-4)
        return str(patch.report())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_decode_step_is_one_graph(patch: str, padded: bool) -> None:
    counter = CompileCounter()
    assert "one graph are not counted" in check("llama", PATCHES[patch], padded, counter)
    assert counter.frame_count == 1
