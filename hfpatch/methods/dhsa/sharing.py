"""Which layers of `dhsa` lead, and what the others take over from them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ...core.call import AttentionCall

T = TypeVar("T")


class LayerSharing:
    """The layers in spans of `span` (0: one of all): the first of each leads, the others take over its `what`.

    What is shared lives as long as the forward pass. A layer whose leader made nothing for the same rows and tokens,
    on the same device, makes its own.
    """

    def __init__(self, what: str, layers: Sequence[int] = (), span: int = 0) -> None:
        self.what = what
        span = span or max(1, len(layers))
        self._leader = {layer: layers[n // span * span] for n, layer in enumerate(layers)}

    def once(self, what: str, call: AttentionCall, tokens: Any, make: Callable[..., T], *args: Any) -> T:
        """`make(*args)`; if `what` is what is shared, the leader makes it for `tokens` and the others are given it."""
        if what != self.what or call.forward is None:
            return make(*args)
        leader, shared = self._leader.get(call.layer, call.layer), call.forward.shared
        place = ("dhsa", leader, what, call.rows, tokens, call.k.device)
        if call.layer == leader or place not in shared:
            shared[place] = make(*args)
        made: T = shared[place]
        return made
