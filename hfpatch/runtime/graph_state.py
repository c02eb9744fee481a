"""What methods leave with a static cache, outside of a graph, for decode steps in one."""

from collections.abc import Sequence
from typing import Any

from ..core.call import rows_on
from ..core.method import Method
from .cache_slot import has_room
from .cache_state import cache_layer, followed
from .calls import Place
from .graph_tensors import GraphStates, graph_states_of, put_graph_states, states_before
from .raw_call import RawCall


def leaves_tensors(m: Method) -> bool:
    """Whether a decode step of the method in a graph needs what calls outside of it have left."""
    return type(m).graph_state is not Method.graph_state


def graph_states(cache: Any, slot: int | None, key: str) -> GraphStates | None:
    """What was left with the cache layer for the patch called `key`, by number of the method, or None."""
    return graph_states_of(cache_layer(cache, slot), key)


def leave_for_graphs(raw: RawCall, methods: Sequence[Method], key: str, place: Place) -> None:
    """Have the decode methods leave what graphs need, after a call outside of one; nothing without a static cache."""
    capacity = raw.k.shape[2]
    if not has_room(raw.cache, raw.slot, capacity) or raw.blocker():
        return
    groups = raw.groups()
    if isinstance(groups, str):
        return
    layer, states = followed(cache_layer(raw.cache, raw.slot)), raw.states(key)
    before = states_before(layer, key) if raw.q.shape[2] == 1 else None
    whole: GraphStates = {n: {} for n, _ in enumerate(methods)}
    for tokens in groups:
        call = place.call(raw, raw.phase, tokens, None)
        call.states = states
        rows = slice(None) if len(tokens.rows) == len(raw.q) else rows_on(raw.q.device, tokens.rows)
        for n, m in enumerate(methods):
            known = None if before is None else {name: x[rows] for name, x in before[n].items()}
            for name, x in m.graph_state(call, capacity, known).items():
                if isinstance(rows, slice):
                    whole[n][name] = x
                else:
                    whole[n].setdefault(name, x.new_zeros(len(raw.q), *x.shape[1:]))[rows] = x
    put_graph_states(layer, key, whole)
