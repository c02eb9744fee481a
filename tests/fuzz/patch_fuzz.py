"""What fuzz tests of patches share: how many examples, a tiny model, and what must hold whatever is put in."""

import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir
from test_invariants import tree
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hfpatch import HfpatchError, patched

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hfpatch-hypothesis")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
LAYERS, HEADS, KV_HEADS, HIDDEN = 4, 4, 2, 32
HEAD = HIDDEN // HEADS


def runs(few: int) -> pytest.MarkDecorator:
    """Parametrize `examples`: a few in the default suite, ten times as many under `-m slow`."""
    long = pytest.param(10 * few, marks=pytest.mark.slow, id="long")
    return pytest.mark.parametrize("examples", [pytest.param(few, id="short"), long])


def fixed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, as long as they take, and no files about them."""
    quick = (Phase.explicit, Phase.generate, Phase.shrink)
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=quick,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@cache
def tiny() -> PreTrainedModel:
    """A random Llama of four layers."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@cache
def prompt(length: int = 40) -> Tensor:
    """Token ids `[2, length]`."""
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))


def refused_or_finite(make: Callable[[], tuple[Any, dict[str, Any]]]) -> bool:
    """Patch the tiny model with what `make` gives and run it: True if it ran with finite logits, False if refused.

    Anything else fails: another exception, numbers that are not finite, a model that is not as it was.
    """
    model, before = tiny(), tree(tiny())
    try:
        method, more = make()
        with patched(model, method, **more) as patch, torch.no_grad():
            cache = None
            for ids in (prompt(), prompt(5), prompt(1)):
                out = model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                assert out.logits.isfinite().all()
            str(patch.report())
        return True
    except HfpatchError as error:
        text = str(error)
        assert text and "\n" not in text and len(text) < 2000
        return False
    finally:
        assert tree(model) == before
