"""Methods in order, with the points at which they act."""

from collections.abc import Sequence

from ..core.method import Method


class Chain:
    """The methods that act on a call, in order, and which act at which point: worked out once, not per call."""

    def __init__(self, methods: Sequence[Method], executor: str | None = None) -> None:
        self.methods = list(methods)
        self.router = next((m for m in methods if "route" in m.points()), None)
        self.planners = [m for m in methods if m.points() & {"select", "bias", "reweight"}]
        self.outputs = [m for m in methods if "output" in m.points()]
        self.observers = [m for m in methods if "observe" in m.points()]
        self.stateful = any(m.stateful for m in methods)
        self.stepless = not self.stateful and all(m.causality == "yes" for m in methods)
        self.needs_lse = any("lse" in m.needs for m in methods)
        self.looks = bool(self.outputs or self.observers)
        self.executor = executor or next((m.executor for m in methods if m.executor is not None), None)
        self._routed: dict[Method | None, Chain] = {}

    def routed(self, child: Method | None) -> "Chain":
        """The chain for rows that the router sends to `child`."""
        if child not in self._routed:
            others = [m for m in self.methods if m is not self.router]
            self._routed[child] = Chain([*others, child] if child else others, self.executor)
        return self._routed[child]
