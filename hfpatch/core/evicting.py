"""Methods that drop keys from the cache: when, how many, and what is always kept; what is left to them are scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config.common import dense_layers
from ..config.method_config import MethodConfig, option
from ..errors import ConfigError, UnsupportedModelError
from .blocks import tokens_of
from .call import AttentionCall
from .method import Method
from .places import Places, best_places, pyramid

FEWEST_SLOTS = 128  # what a long `interval` gets at least; more as it fills


@dataclass(kw_only=True)
class KeepConfig(MethodConfig):
    """Settings of every method that keeps the keys with the best scores; sizes in tokens."""

    budget: int | float = option(2048, "keys that each head keeps: tokens, or a share of those seen", gt=0, share=True)
    sink: int = option(4, "first tokens, always kept", ge=0)
    window: int = option(64, "most recent tokens, always kept", ge=1)
    interval: int = option(128, "tokens by which the cache outgrows its budget before decode steps drop some", ge=1)
    evict: str = option("prompt", "when keys are dropped", choices=("prompt", "decode", "both"))
    layers_budget: str = option(
        "uniform", "same budget in all layers, or more in early ones (PyramidKV)", choices=("uniform", "pyramid")
    )
    dense_layers: int = dense_layers()

    def validate(self) -> None:
        least = self.sink + self.window
        if isinstance(self.budget, int) and self.budget <= least:
            raise ConfigError(
                f"{self.method}: budget={self.budget} leaves nothing to choose beside sink and window, {least} "
                "tokens; raise it, or lower these."
            )


K = TypeVar("K", bound=KeepConfig)


class Evicting(Method[K]):
    """`scores` tells how much each key is worth; the first and last tokens and the best between stay in the cache.

    Prompts: at the end of the first call of a cache, and of later ones with `interval` tokens or more. Decode steps:
    whenever the cache is `interval` keys over the budget. A few tokens at once, as speculation has them, never evict.
    No call's own output changes; the next one finds fewer keys.
    """

    def __init__(self, config: K, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self.retain = self._retain
        self.needs = frozenset({"cache"})
        self.keeps_first = config.sink > 0
        self._layers: list[int] = []

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        check_own_keys(model, self.name)
        self._layers = sorted(layers)

    def scores(self, call: AttentionCall) -> Tensor:
        """Scores `[B, Hc, Lk - window]` of all keys but the window's, in float32."""
        raise TypeError(f"{type(self).__name__} does not define scores()")

    def budget(self, call: AttentionCall) -> int:
        """Keys per head that the layer of a call keeps."""
        c, always = self.config, self.config.sink + self.config.window
        tokens = tokens_of(c.budget, call.seen)
        if c.layers_budget == "pyramid" and call.layer in self._layers:
            at = self._layers.index(call.layer)
            tokens = pyramid(tokens, always, call.seen, at, len(self._layers))
        return max(tokens, always)

    def _due(self, call: AttentionCall, budget: int) -> bool:
        c = self.config
        if call.Lq == 1:
            return c.evict != "prompt" and call.Lk >= budget + c.interval
        whole = call.seen == call.Lq or call.Lq >= c.interval
        return whole and c.evict != "decode" and call.Lk > budget

    @torch.no_grad()
    def _retain(self, call: AttentionCall) -> Places | None:
        c, budget = self.config, self.budget(call)
        if not self._due(call, budget):
            return None
        room = min(c.interval, max(budget, FEWEST_SLOTS))
        return Places(best_places(self.scores(call), budget, c.sink, c.window), c.window, room)


def check_own_keys(model: Any, name: str) -> None:
    """Raise UnsupportedModelError when layers of the model read the keys of others, which none may then drop."""
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{name}: layers of this model read the keys of others, which must not be dropped; use a method that "
            "leaves the cache whole."
        )
