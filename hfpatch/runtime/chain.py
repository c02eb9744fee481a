"""Methods in order with the points at which they act, and what they plan for a call."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.call import AttentionCall
from ..core.method import Method
from ..core.reweight import Columns
from ..core.selection import Selection
from .padding import RowGroup


class Chain:
    """The methods that act on a call, in order, and which act at which point: worked out once, not per call."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)
        self.router = next((m for m in methods if "route" in m.points()), None)
        self.planners = [m for m in methods if m.points() & {"select", "bias", "regroup"}]
        self.outputs = [m for m in methods if "output" in m.points()]
        self.observers = [m for m in methods if "observe" in m.points()]
        self.stateful = any(m.stateful for m in methods)
        self.stepless = not self.stateful and all(m.causality == "yes" for m in methods)
        self.needs_lse = any("lse" in m.needs for m in methods)
        self.executor = next((m.config.executor for m in methods if m.config.executor), None)
        self._routed: dict[Method | None, Chain] = {}

    def routed(self, child: Method | None) -> "Chain":
        """The chain for rows that the router sends to `child`."""
        if child not in self._routed:
            others = [m for m in self.methods if m is not self.router]
            self._routed[child] = Chain([*others, child] if child else others)
        return self._routed[child]


@dataclass(eq=False)
class Plan:
    """What is to be done for rows that share their padding (`whole`) and their route (`call`).

    `first` is where the call's queries stand among those of the raw call.
    """

    call: AttentionCall
    whole: AttentionCall
    chain: Chain
    group: RowGroup
    selection: Selection | None
    columns: list[Columns]
    first: int

    @property
    def needs_lse(self) -> bool:
        """Whether the base implementation, which gives no lse, is not enough."""
        return bool(self.selection is not None or self.columns or self.call.bias is not None or self.chain.needs_lse)

    @property
    def fits_one_query(self) -> bool:
        """Whether nothing asks for more than the output of dense attention, or for another executor."""
        chain = self.chain
        return self.selection is None and not chain.needs_lse and chain.executor in (None, "torch")
