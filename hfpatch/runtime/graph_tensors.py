"""Tensors of fixed sizes that a layer of a static cache carries for decode steps in a graph.

They lie under the patch's key in the cache layer's `hfpatch_graph`, by number of the method. Whatever else happens to
the keys drops them; the memory is kept aside, since a captured graph goes on reading it where it was.
"""

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
GraphStates = dict[int, Tensors]
_NOW, _SPARE = "hfpatch_graph", "hfpatch_graph_spare"


def graph_states_of(layer: Any, key: str) -> GraphStates | None:
    """What was put there for the patch called `key`, by number of the method; None where there is nothing."""
    states: dict[str, GraphStates] = getattr(layer, _NOW, None) or {}
    return states.get(key)


def put_graph_states(layer: Any, key: str, states: GraphStates) -> None:
    """Let the layer carry `states`, in the memory of earlier ones where these have the same sizes."""
    spare: GraphStates = vars(layer).get(_SPARE, {}).pop(key, {})
    kept = {n: {name: _placed(x, spare.get(n, {}).get(name)) for name, x in own.items()} for n, own in states.items()}
    vars(layer).setdefault(_NOW, {})[key] = kept


def drop_graph_states(layer: Any) -> None:
    """Take away what the layer carries."""
    if _NOW in vars(layer):
        vars(layer).setdefault(_SPARE, {}).update(vars(layer).pop(_NOW))


def move_graph_states(layer: Any, source: list[int]) -> None:
    """Follow the batch, which became `[old[source[0]], old[source[1]], ...]`."""
    for states in vars(layer).get(_NOW, {}).values():
        for own in states.values():
            for name, x in own.items():
                own[name] = _placed(x.index_select(0, torch.tensor(source, device=x.device)), x)


def _placed(x: Tensor, place: Tensor | None) -> Tensor:
    if place is None or (place.shape, place.dtype, place.device) != (x.shape, x.dtype, x.device):
        with torch.inference_mode(False):  # a graph may run outside of it
            place = torch.empty_like(x, requires_grad=False)
        torch._dynamo.mark_static_address(place)
    with torch.no_grad():
        return place.copy_(x)
