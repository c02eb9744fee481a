"""Tensors of fixed sizes that a layer of a static cache carries for decode steps in a graph.

They lie under the patch's key in the cache layer's `hfpatch_graph`, by number of the method. Calls outside of a graph
are counted, so that no graph takes what does not know all keys; the memory stays: a captured graph goes on reading it.
"""

from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
GraphStates = dict[int, Tensors]
_GRAPH, _UNSEEN = "hfpatch_graph", "hfpatch_unseen"
_LOST = 2


def graph_states_of(layer: Any, key: str, unseen: int = 0) -> GraphStates | None:
    """What was put there for the patch called `key`, by number of the method; None if it is gone or out of date.

    Up to date is what has missed `unseen` calls.
    """
    if getattr(layer, _UNSEEN, _LOST) != unseen:
        return None
    states: GraphStates | None = getattr(layer, _GRAPH).get(key)
    return states


def states_before(layer: Any, key: str) -> GraphStates | None:
    """What was up to date before the present call."""
    return graph_states_of(layer, key, 1)


def put_graph_states(layer: Any, key: str, states: GraphStates) -> None:
    """Let the layer carry `states`, in the memory of earlier ones where these have the same sizes."""
    old: GraphStates = vars(layer).get(_GRAPH, {}).get(key, {})
    kept = {n: {name: _placed(x, old.get(n, {}).get(name)) for name, x in own.items()} for n, own in states.items()}
    vars(layer).update({_GRAPH: {key: kept}, _UNSEEN: 0})


def count_update(layer: Any) -> None:
    """Note that keys come outside of a graph."""
    if _GRAPH in vars(layer):
        setattr(layer, _UNSEEN, getattr(layer, _UNSEEN) + 1)


def drop_graph_states(layer: Any) -> None:
    """Let no graph use what the layer carries."""
    if _GRAPH in vars(layer):
        setattr(layer, _UNSEEN, _LOST)


def move_graph_states(layer: Any, source: list[int]) -> None:
    """Follow the batch, which became `[old[source[0]], old[source[1]], ...]`."""
    for states in vars(layer).get(_GRAPH, {}).values():
        for own in states.values():
            for name, x in own.items():
                own[name] = _placed(x.index_select(0, torch.tensor(source, device=x.device)), x)


def _placed(x: Tensor, place: Tensor | None) -> Tensor:
    if place is None or (place.shape, place.dtype, place.device) != (x.shape, x.dtype, x.device):
        with torch.inference_mode(False):  # a graph may run outside of it
            place = torch.empty_like(x, requires_grad=False)
        torch._dynamo.mark_static_address(place)
    if x.data_ptr() == place.data_ptr():
        return place
    with torch.no_grad():
        return place.copy_(x)
