"""The ways in which the same tokens are fed to a model, and how exactly the unpatched model agrees with itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel

from .build import prompt
from .oracle import Listener
from .session import Session, takes_positions

LENGTHS, CAPACITY = [63, 40], 96
LENGTH = LENGTHS[0]
DECODE = (55,) + (1,) * 8
TURNS = (30, 1, 1, 12, 1, 1, 14, 1, 1, 1)
LONG = (30,) + (1,) * 33
PADDED = (59,) + (1,) * 4


@dataclass(frozen=True)
class Scenario:
    """One way of feeding the tokens `ids [B, L]`: in `pieces`, with a cache of `capacity` (0: one that grows)."""

    name: str
    ids: Tensor = field(repr=False)
    pieces: tuple[int, ...] = (LENGTH,)
    cached: bool = True
    mask: Tensor | None = field(default=None, repr=False)
    positions: bool = False
    capacity: int = 0

    def run(self, model: PreTrainedModel, listener: Listener | None = None) -> Tensor:
        """Logits of the real tokens `[n, V]`. Raises what the model raises, TypeError for logits of another shape."""
        session = Session(model, listener, self.mask, self.positions, self.capacity)
        out = torch.cat([session.feed(x, self.cached) for x in self.ids.split(list(self.pieces), 1)], 1)
        if out.shape[:2] != self.ids.shape:
            raise TypeError(f"it gives logits of shape {list(out.shape)} for tokens of shape {list(self.ids.shape)}")
        return out.flatten(0, 1) if self.mask is None else out[self.mask.bool()]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value of what is wanted."""
    return float((got - want).abs().max() / want.abs().max())


def prefill() -> Scenario:
    """All tokens at once and no cache."""
    return Scenario("prefill", prompt(len(LENGTHS), LENGTH), cached=False)


def others() -> list[Scenario]:
    """Everything else, of the same tokens as `prefill`."""
    ids = prompt(len(LENGTHS), LENGTH)
    padded, mask = zoo.left_pad(ids, LENGTHS)
    return [
        Scenario("decode", ids, DECODE),
        Scenario("turns", ids, TURNS),
        Scenario("static cache", ids, DECODE, capacity=CAPACITY),
        Scenario("left padding", padded, PADDED, mask=mask),
    ]


def long() -> Scenario:
    """More tokens one by one than any tiny window holds."""
    return replace(prefill(), name="long", pieces=LONG, cached=True)


def rows_alone(model: PreTrainedModel, whole: Scenario) -> Tensor:
    """What a padded batch should give: the logits of its rows, each by itself `[n, V]`."""
    rows = [replace(whole, ids=whole.ids[r : r + 1, :n], pieces=(n,)) for r, n in enumerate(LENGTHS)]
    return torch.cat([row.run(model) for row in rows])


def pads_are_seen(model: PreTrainedModel, padded: Scenario) -> bool:
    """Whether what stands in the padding changes the logits of real tokens."""
    other = torch.where(padded.mask.bool(), padded.ids, padded.ids.flip(1)) if padded.mask is not None else padded.ids
    return relative(replace(padded, ids=other).run(model), padded.run(model)) > 1e-5


def fitted(model: PreTrainedModel, scenario: Scenario, want: Tensor) -> tuple[Scenario, float]:
    """The scenario in the form that suits the model best, and how far it is then from `want` without a patch.

    Raises what the model raises when no form works.
    """
    forms = [scenario]
    if scenario.mask is not None:
        once = replace(scenario, pieces=(scenario.ids.shape[1],), cached=False)
        forms = [f for x in (scenario, once) for f in (replace(x, positions=True), x)]
        if not takes_positions(model):
            forms = forms[1::2]
    found: list[tuple[float, int]] = []
    failure: Exception = TypeError("nothing to try")
    for n, form in enumerate(forms):
        try:
            found.append((relative(form.run(model), want), n))
        except Exception as error:
            failure = error
            continue
        if found[-1][0] < 1e-5:
            break
    if not found:
        raise failure
    error, n = min(found)
    return forms[n], error
