"""What a run is made of: jobs, their cells, and the session that runs them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

from ..errors import EvaluationError
from .models import Loaded, load_model
from .variants import Variant

Data = dict[str, Any]


@dataclass(frozen=True, order=True)
class Cell:
    """The smallest part of a run that is done or not done; `variant` is "" when all variants share it."""

    job: str
    variant: str
    length: int

    @property
    def key(self) -> str:
        """Name of the cell in the run's journal."""
        return f"{self.job} | {self.variant} | {self.length}"


@dataclass(frozen=True)
class CellResult:
    """What a cell found: numbers, and the outcome of every sample."""

    data: Data
    samples: list[Data] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What a cell takes, for estimates; on a CPU a cell of its `own_process` loads the model anew.

    `read_again` prompts are read once more, with their answers.
    """

    prompts: int
    new_tokens: int
    at_once: int = 1
    own_process: bool = False
    read_again: int = 0


class Runnable(Protocol):
    """What a run asks of a job; `hfpatch.evals.jobs.Job` is the class to derive from."""

    kind: ClassVar[str]
    timed: ClassVar[bool]
    row: ClassVar[Data]

    @property
    def label(self) -> str: ...

    def cells(self, variants: Sequence[Variant]) -> list[Cell]: ...

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int: ...

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None: ...

    def check(self, cell: Cell, session: "Session") -> None: ...

    def run(self, cell: Cell, session: "Session") -> CellResult: ...

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]: ...

    def more(self, rows: Sequence[Data]) -> Data: ...

    def settings(self) -> Data: ...


@dataclass
class Session:
    """The model, loaded when first used, with everything a cell needs to know."""

    model_name: str
    variants: Sequence[Variant]
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    step: Callable[[], None] = lambda: None

    @cached_property
    def loaded(self) -> Loaded:
        """Model and tokenizer."""
        return load_model(self.model_name, self.dtype, self.device)

    def variant(self, name: str) -> Variant:
        """The variant of that name. Raises EvaluationError."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise EvaluationError(f"There is no variant {name!r:.200} in this run.")
