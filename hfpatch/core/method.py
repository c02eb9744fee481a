"""The base class of all methods: the points at which a method may act on a layer call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args

from torch import Tensor, nn

from ..config.method_config import MethodConfig
from ..errors import IncompatibleMethodsError
from .call import AttentionCall
from .graph_step import GraphKeys, GraphStep
from .learned import Learned, ModelSizes
from .places import Places
from .reweight import Columns
from .selection import Selection, SinkWindow

C = TypeVar("C", bound=MethodConfig)
POINTS = ("select", "bias", "reweight", "output", "route", "observe")


class Method(Generic[C]):
    """Override any of `select`, `bias`, `reweight`, `output`, `route`, `observe`; the rest stays dense.

    `class Mine(Method[MineConfig])` takes its settings as `self.config`. Of these `phase` narrows `acts_in`,
    `dense_layers` are left out by `pick`, and `min_length` is what `too_short` goes by.
    One instance serves all patched layers of one model; what belongs to a layer or a cache goes into `call.state`
    (set `stateful`). `kinds` are the layer kinds it may act on, `acts_in` the phases: a chunk after a cache counts as
    prefill, or, if it has few tokens, as so many decode steps. `needs` may name "lse", "q_pre_rope", "forward"
    (what layers share in a pass) and "cache" (`call.Hc`, `cached`, `places`). `causality` says what a later token can
    change for an earlier one: "yes" nothing, "tile" which keys the queries of its own block see, "no" anything.
    `positional` methods give sinks and windows, worked out from sizes alone, and compile into one graph; others say
    `compiles` (see `graph_select`).

    `retain(call)`, where there is one, is asked when a call is done and names the only keys that its rows will ever
    look at again: a `SinkWindow`, which goes on dropping once all rows agree, `Places`, a set for now and each head,
    or None. A layer has one such method, and others on it must not go by positions: `reads` is "content" of those that
    do not, "first" of those that want the first token in its place (`keeps_first` of what drops), "positions" of those
    that do.
    """

    config_class: ClassVar[type[MethodConfig]] = MethodConfig
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    kinds: ClassVar[frozenset[str]] = frozenset({"full"})
    reads: ClassVar[str] = "content"
    trained: ClassVar[bool] = False
    compiles: ClassVar[bool] = False

    _points: ClassVar[frozenset[str]] = frozenset()
    _in_graph: ClassVar[bool] = False
    acts_in: frozenset[str] = frozenset({"prefill", "decode"})
    causality: str = "yes"
    positional: bool = False
    stateful: bool = False
    retain: Callable[[AttentionCall], SinkWindow | Places | None] | None = None
    keeps_first: bool = False
    needs: frozenset[str] = frozenset()

    def __init__(self, config: C, tensors: Mapping[str, Tensor] | None = None) -> None:
        config.check()
        self.config = config
        self.given: Mapping[str, Tensor] = dict(tensors or {})
        if (phase := getattr(config, "phase", "both")) in self.acts_in:
            self.acts_in = frozenset({phase})

    def pick(self, layers: list[int]) -> list[int]:
        """Which of the decoder layers the user's `layers` leave to it, in order, the method wants."""
        first = getattr(self.config, "dense_layers", 0)
        return [n for n in layers if n >= first]

    def prepare(self, model: nn.Module, layers: Sequence[int]) -> None:
        """Look at the model before it is patched; raise to refuse it."""

    def notes(self) -> list[str]:
        """Sentences for the report, about this method on this model."""
        least = getattr(self.config, "min_length", 0)
        return [f"{self.name}: calls with fewer than {least} keys run dense (min_length)"] if least else []

    def too_short(self, call: AttentionCall) -> bool:
        """Whether the call has fewer keys than the setting `min_length` asks for."""
        return call.Lk < getattr(self.config, "min_length", 0)

    def learns(self, sizes: ModelSizes) -> Mapping[str, Learned] | None:
        """The tensors it takes for a model of these sizes, by name; `given` is checked against it before `pick`.

        None: it says nothing, and what it is given goes unchecked.
        """
        return {} if type(self).tensors is Method.tensors else None

    def tensors(self) -> dict[str, Tensor]:
        """Learned tensors to save beside the config."""
        return dict(self.given)

    def select(self, call: AttentionCall) -> Selection | None:
        """Which keys each query attends to; None leaves the layer dense."""
        return None

    def graph_state(
        self, call: AttentionCall, capacity: int, before: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What decode steps in a graph will need of the keys so far: tensors of fixed sizes with rows first.

        Asked after every call outside of a graph on a static cache of `capacity` slots, for rows that share padding;
        for a decode step with what there was `before` it, which may be changed in place.
        """
        return {}

    def graph_select(self, step: GraphStep) -> GraphKeys | None:
        """`select` of a decode step in a graph; None where a cache of that capacity leaves every step dense.

        A method that `compiles` has this beside `select`, its `reweight` gives constant factors per head, its
        `output` looks at the call's tensors alone, and it has no other points.
        """
        return None

    def graph_blocker(self, capacity: int) -> str | None:
        """Why decode steps on a cache of so many slots cannot be part of a graph of torch.compile, or None."""
        return None if self._in_graph else "its decode step has no form of fixed shapes"

    def bias(self, call: AttentionCall) -> Tensor | None:
        """Additive bias on key columns, `[B|1, Hq|1, Lk]`, after soft-capping."""
        return None

    def reweight(self, call: AttentionCall) -> list[Columns]:
        """Factors on the softmax weights of disjoint key columns, renormalised afterwards."""
        return []

    def output(self, call: AttentionCall, out: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Head outputs `[B, Lq, Hq, Dv]` on their way to the output projection; with their new lse if it changes."""
        return out

    def route(self, call: AttentionCall) -> "list[Method | None]":
        """For each row of the call the method that serves it, None for dense."""
        return [None] * call.B

    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        """Read-only look at the result; `lse [B, Hq, Lq]` is given when `needs` names "lse"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "regroup"):
            raise TypeError(f"{cls.__name__}.regroup would never be called: the point is `reweight` now; rename it.")
        own = [arg for base in cls.__dict__.get("__orig_bases__", ()) for arg in get_args(base)]
        if "config_class" not in cls.__dict__:
            cls.config_class = next((c for c in own if _is_config(c)), cls.config_class)
        cls._points = frozenset(p for p in POINTS if getattr(cls, p) is not getattr(Method, p))
        step, choice = (next(c for c in cls.__mro__ if name in vars(c)) for name in ("graph_select", "select"))
        fixed = cls.compiles and cls._points <= {"select", "reweight", "output"} and issubclass(step, choice)
        cls._in_graph = fixed or (cls.positional and cls._points == {"select"})

    @classmethod
    def points(cls) -> frozenset[str]:
        """The points this method overrides."""
        return cls._points

    @property
    def name(self) -> str:
        """Registered name."""
        return self.config.method

    @property
    def executor(self) -> str | None:
        """The executor it names for its layers, if any."""
        return self.config.executor


def _is_config(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, MethodConfig)


def check_compatible(methods: Sequence[Method]) -> None:
    """Raise IncompatibleMethodsError when methods cannot act on one layer.

    Two that route, drop keys or name an executor cannot, nor can what goes by positions where others drop keys.
    """
    routing = [m.name for m in methods if "route" in m.points()]
    if len(routing) > 1:
        raise IncompatibleMethodsError(
            f"{routing[0]!r} and {routing[1]!r} both route the same layer; give them different `layers`."
        )
    _check_dropping(methods)
    naming = {m.executor: m.name for m in methods if m.executor is not None}
    if len(naming) > 1:
        (one, first), (other, second), *_ = naming.items()
        raise IncompatibleMethodsError(
            f"{first!r} asks for executor {one!r}, {second!r} for {other!r} on the same layer; name one of them, or "
            "give the methods different `layers`."
        )


def _check_dropping(methods: Sequence[Method]) -> None:
    dropping = [m for m in methods if m.retain is not None]
    if len(dropping) > 1:
        raise IncompatibleMethodsError(
            f"{dropping[0].name!r} and {dropping[1].name!r} both drop keys of the same layer; give them different "
            "`layers`."
        )
    for m in methods if dropping else ():
        if m is not dropping[0] and (m.reads == "positions" or (m.reads == "first" and not dropping[0].keeps_first)):
            where = "positions" if m.reads == "positions" else "the first token, which is not protected,"
            raise IncompatibleMethodsError(
                f"{m.name!r} goes by {where} and {dropping[0].name!r} drops keys of the same layer; give them "
                "different `layers`."
            )
