"""What the tests of dropped keys share: a method with sets of its own, and the oracle: a whole cache under a mask."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache

from hfpatch import Method, MethodConfig, patched
from hfpatch.config import registry
from hfpatch.core.call import AttentionCall
from hfpatch.core.evicting import Evicting, KeepConfig
from hfpatch.core.places import Places
from hfpatch.core.selection import BlockMap, Selection
from hfpatch.runtime.cache_keep import KeptLayer

SMALL: dict[str, Any] = {"sink": 2, "window": 5, "interval": 4}
Log = dict[tuple[int, tuple[int, ...]], list[tuple[int, Tensor]]]


@dataclass(kw_only=True)
class ToyKeepConfig(KeepConfig):
    method: ClassVar[str] = "toy-keep"


class ToyKeep(Evicting[ToyKeepConfig]):
    """Keys by a number that looks random; another budget in every layer, another set in every head."""

    config_class = ToyKeepConfig

    def budget(self, call: AttentionCall) -> int:
        return super().budget(call) + 2 * call.layer

    def scores(self, call: AttentionCall) -> Tensor:
        return (97 * call.cached[..., 0].float()).sin()[..., : call.Lk - self.config.window]


@dataclass(kw_only=True)
class OracleConfig(MethodConfig):
    method: ClassVar[str] = "toy-oracle"


class Oracle(Method[OracleConfig]):
    """Shows queries of a whole cache what a log says was kept of it at that time, and all tokens since."""

    config_class = OracleConfig
    stateful = True
    log: ClassVar[Log] = {}

    def select(self, call: AttentionCall) -> Selection | None:
        if "kept" not in call.state:
            return None
        at, kept = call.state["at"][0], call.state["kept"]
        seen = torch.zeros(*kept.shape[:2], max(call.Lk, at), dtype=torch.bool).scatter_(2, kept.long(), True)
        seen[..., at:] = True
        seen, counts = seen[..., : call.Lk], seen[..., : call.Lk].sum(-1)
        indices = seen.int().sort(dim=-1, descending=True, stable=True).indices
        return BlockMap(indices[:, :, None], counts[:, :, None], call.Lq, 1)

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        events = self.log.get((call.layer, call.rows), [])
        if events and events[0][0] == call.Lk:
            at, kept = events.pop(0)
            call.state.update(at=[at] * call.B, kept=kept)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (ToyKeep, Oracle):
        monkeypatch.setitem(registry._registered, cls.config_class.method, cls)


@contextmanager
def recorded(model: Any, method: str, **settings: Any) -> Iterator[tuple[Any, Log]]:
    """The model patched with a method that drops keys, and a log of the tokens it keeps, by layer and rows."""
    log: Log = defaultdict(list)
    original = Evicting._retain

    def _retain(self: Any, call: AttentionCall) -> Places | None:
        answer = original(self, call)
        if answer is not None:
            index = answer.index.expand(call.B, call.Hc, -1)
            places = call.places
            log[call.layer, call.rows].append((call.seen, index if places is None else places.long().gather(2, index)))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evicting, "_retain", _retain)
        with patched(model, method, **settings) as handle:
            yield handle, log


@contextmanager
def oracle(model: Any, log: Log, layers: Any) -> Iterator[Any]:
    """The model with a whole cache under the mask of a log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Oracle, "log", {key: list(events) for key, events in log.items()})
        with patched(model, "toy-oracle", layers=layers) as handle:
            yield handle


@torch.no_grad()
def told(
    model: Any, ids: Tensor, cuts: list[int], mask: Tensor | None = None, cache: Any = None
) -> tuple[Tensor, Any]:
    """Logits of the tokens from `cuts[0]` on, read in calls that end at the other cuts, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts = []
    for a, b in itertools.pairwise(cuts):
        more: dict[str, Any] = {}
        if mask is not None:
            at = zoo.positions(mask)[:, a:b]
            three = "vl" in model.config.model_type
            more = {"attention_mask": mask[:, :b], "position_ids": at.expand(3, -1, -1) if three else at}
        parts.append(model(ids[:, a:b], past_key_values=cache, **more).logits)
    return torch.cat(parts, 1), cache


def kept_layers(cache: Any) -> dict[int, Any]:
    """The layers that have dropped keys."""
    return {n: layer for n, layer in enumerate(cache.layers) if isinstance(layer, KeptLayer)}


def stored(layer: Any) -> int:
    """Bytes of a layer's keys and values, room included."""
    return sum(x.untyped_storage().nbytes() for x in (layer.keys, layer.values))
