"""What the handle of a patch can do that runs the model itself: reading, by a method that reads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from .core.method import Method
from .errors import ConfigError

if TYPE_CHECKING:
    from .methods.infiniretri.reader import Context, Retrieval


@runtime_checkable
class Reads(Protocol):
    """A method that reads inputs beyond the window, such as `infiniretri`."""

    def retrieve(self, model: nn.Module, context: Any, question: Any, **options: Any) -> Any: ...

    def answer(self, model: nn.Module, found: Any, **options: Any) -> Any: ...

    def generate(self, model: nn.Module, context: Any, question: Any, **options: Any) -> Any: ...

    def rank_layers(self, model: nn.Module, **options: Any) -> Any: ...


class Drives:
    """The part of a patch's handle that runs the model; it needs a method that does."""

    _model: nn.Module
    methods: Sequence[Method]

    @property
    def reads(self) -> bool:
        """Whether `retrieve`, `answer`, `generate` and `rank_layers` have a method behind them."""
        return any(isinstance(m, Reads) for m in self.methods)

    def retrieve(
        self,
        context: "Context | list[str]",
        question: str | list[str],
        *,
        tokenizer: Any = None,
        state_file: str | None = None,
        progress: bool = True,
        answer_prefix: str = "",
    ) -> "Retrieval | list[Retrieval]":
        """Read `context` with `question` in mind and return the sentences kept. Raises ConfigError, InputError."""
        return self._reader("retrieve").retrieve(
            self._model, context, question, tokenizer=tokenizer, state_file=state_file, progress=progress,
            answer_prefix=answer_prefix,
        )  # fmt: skip

    def answer(
        self, found: "Retrieval | list[Retrieval]", *, tokenizer: Any = None, **generate_kwargs: Any
    ) -> str | list[str]:
        """Answer the question of one retrieval, or of each of a list. Raises ConfigError, InputError."""
        return self._reader("answer").answer(self._model, found, tokenizer=tokenizer, **generate_kwargs)

    def generate(
        self,
        context: "Context | list[str]",
        question: str | list[str],
        *,
        tokenizer: Any = None,
        state_file: str | None = None,
        progress: bool = True,
        answer_prefix: str = "",
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """`retrieve` and `answer` in one. Raises ConfigError, InputError."""
        return self._reader("generate").generate(
            self._model, context, question, tokenizer=tokenizer, state_file=state_file, progress=progress,
            answer_prefix=answer_prefix, **generate_kwargs,
        )  # fmt: skip

    def rank_layers(
        self,
        *,
        tokenizer: Any = None,
        question: str = "What is the secret code for {key}?",
        probes: int = 8,
        seed: int = 0,
    ) -> list[tuple[int, float]]:
        """Which layer to read with: `(layer, score)`, best first. Raises ConfigError, InputError."""
        return self._reader("rank_layers").rank_layers(
            self._model, tokenizer=tokenizer, question=question, probes=probes, seed=seed
        )

    def _reader(self, what: str) -> Reads:
        for method in self.methods:
            if isinstance(method, Reads):
                return method
        names = ", ".join(m.name for m in self.methods)
        raise ConfigError(f"{what}: {names} does not read; patch the model with 'infiniretri'.")
