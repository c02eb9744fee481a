"""What calls outside of a graph leave for decode steps in one: made anew when it no longer fits the keys."""

import pytest
import torch
import zoo
from injection_helpers import fresh
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from hfpatch import patched
from hfpatch.config.registry import make_config

LENGTH, SLOTS, PAGE = 60, 96, 4
SETTINGS = {
    "quest": {"budget": 24, "page": PAGE, "min_length": 0},
    "dhsa": {"boundaries": "novelty", "budget": 32, "sink": 4, "local": 4, "block_q": 8, "chunk": 3, "radius": 1},
}


def test_keys_changed_by_hand_are_read_again() -> None:
    model = fresh(num_hidden_layers=1)
    cache = StaticCache(model.config, max_cache_len=SLOTS)
    with torch.no_grad(), patched(model, make_config("quest", SETTINGS["quest"])):
        model(zoo.prompt(model, 2, LENGTH), past_key_values=cache)
        cache.layers[0].keys[:, :, :LENGTH] *= -3
        model(zoo.prompt(model, 2, 1), past_key_values=cache)
    (states,) = cache.layers[0].hfpatch_graph.values()
    pages = cache.layers[0].keys[:, :, :LENGTH].unflatten(2, (-1, PAGE))
    assert torch.equal(states[0]["ends"][:, :, : LENGTH // PAGE], torch.cat([pages.amax(3), pages.amin(3)], -1))


def last_logits(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """Logits of a prompt's first row and of two decode steps on it, `[3, V]`."""
    cache, ids = StaticCache(model.config, max_cache_len=SLOTS), zoo.prompt(model, 2, LENGTH + 2)
    seen: list[Tensor] = []
    for start, stop in ((0, LENGTH), (LENGTH, LENGTH + 1), (LENGTH + 1, LENGTH + 2)):
        out = model(ids[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop])
        seen.append(out.logits[0, -1])
    return torch.stack(seen)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_row_of_padding_alone_does_no_harm(method: str) -> None:
    model, mask = fresh(num_hidden_layers=1), torch.ones(2, LENGTH + 2, dtype=torch.long)
    with torch.no_grad(), patched(model, make_config(method, SETTINGS[method])):
        want = last_logits(model, mask)
        mask[1] = 0
        torch.testing.assert_close(last_logits(model, mask), want, atol=2e-5, rtol=2e-4)
