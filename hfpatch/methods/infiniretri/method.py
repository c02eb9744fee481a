"""InfiniRetri: reading inputs far beyond the window, keeping the sentences the question's attention points at."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...config.method_config import MethodConfig, option
from ...config.registry import register_method
from ...core.call import AttentionCall
from ...core.method import Method
from ...errors import ConfigError
from .reader import Context, Reader, Retrieval
from .scores import Seen, question_view


@dataclass(kw_only=True)
class InfiniRetriConfig(MethodConfig):
    """Settings of `infiniretri`; sizes in tokens."""

    method: ClassVar[str] = "infiniretri"
    chunk_tokens: int = option(1024, "context read per step", ge=16)
    top_tokens: int = option(300, "best tokens per step whose sentences are kept", ge=1)
    phrase: int = option(8, "neighbouring tokens whose attention is summed", ge=1)
    keep_budget: int | None = option(1024, "most tokens kept between steps; no cap when None", ge=16)
    mode: str = option("fixed", "'faithful' follows the reference step by step", choices=("fixed", "faithful"))
    question_weights: bool = option(True, "weigh question tokens by their attention to the question")
    template: str = option("{context}\n\nQuestion: {question}\nAnswer:", "prompt with {context} before {question}")
    chat: bool | None = option(None, "use the tokenizer's chat template; when it has one if None")

    def validate(self) -> None:
        text = self.template
        both = text.count("{context}") == 1 and text.count("{question}") == 1
        if not both or text.index("{context}") > text.index("{question}"):
            raise ConfigError(
                f"infiniretri: template={text!r} needs {{context}} and after it {{question}}, each exactly once."
            )


@register_method
class InfiniRetri(Method[InfiniRetriConfig]):
    """A loop around the model: read in chunks, keep sentences, answer from what was kept.

    InfiniRetri, arXiv 2502.12962. Only the question rows of one layer with full attention are needed, the last of
    `layers` or, when they are None, the one three fifths up: the model runs its own attention, no map is kept, and the
    layers above do not run while reading. `mode="faithful"` looks at the last layer, takes the question's weights
    from the first chunk and caps nothing, like the reference code; `"fixed"` takes them from each chunk and keeps to
    `keep_budget`. `get_patch(model).retrieve(context, question, tokenizer=...)` reads,
    `.answer(found, tokenizer=...)` answers, and `.generate(context, question, ...)` does both.
    """

    summary = "reads beyond the window in chunks, answers from the sentences it kept"
    paper = "https://arxiv.org/abs/2502.12962"
    reads = "positions"
    acts_in = frozenset({"prefill"})

    def __init__(self, config: InfiniRetriConfig, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config, tensors)
        self._reading = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> "InfiniRetri":
        return type(self)(self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    def pick(self, layers: list[int]) -> list[int]:
        if self.config.layers is None and self.config.mode == "fixed":
            return [layers[len(layers) * 3 // 5]] if layers else []
        return layers[-1:]

    @torch.no_grad()
    def observe(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> None:
        wanted: dict[int, int] | None = getattr(self._reading, "questions", None)
        if wanted is None:
            return
        for n, row in enumerate(call.rows):
            self._reading.views[row] = question_view(call, n, wanted[row])
        if self._reading.stop and len(self._reading.views) == len(wanted):
            raise Seen

    def _reader(self, model: nn.Module, tokenizer: Any) -> Reader:
        return Reader(model, tokenizer, self.config, self._reading)

    def retrieve(
        self,
        model: nn.Module,
        context: Context | list[str],
        question: str | list[str],
        *,
        tokenizer: Any = None,
        state_file: str | None = None,
        progress: bool = True,
        answer_prefix: str = "",
    ) -> Retrieval | list[Retrieval]:
        """Read `context` with `question` in mind and return the sentences kept.

        A list of questions over one context, or of pairs when `context` is a list, gives a list. `context` may be
        an iterator of text. With `state_file` reading goes on where an interrupted call stopped. `answer_prefix`, the
        words an answer will begin with, stands after the question, in a chat in the assistant's turn. Raises
        InputError.
        """
        return self._reader(model, tokenizer).retrieve(context, question, state_file, progress, answer_prefix)

    def answer(
        self, model: nn.Module, found: Retrieval | list[Retrieval], *, tokenizer: Any = None, **generate_kwargs: Any
    ) -> str | list[str]:
        """Answer the question of one retrieval, or of each of a list, from what it kept. Raises InputError."""
        several = found if isinstance(found, list) else [found]
        answers = self._reader(model, tokenizer).answer(several, generate_kwargs)
        return answers if isinstance(found, list) else answers[0]

    def generate(
        self,
        model: nn.Module,
        context: Context | list[str],
        question: str | list[str],
        *,
        tokenizer: Any = None,
        state_file: str | None = None,
        progress: bool = True,
        answer_prefix: str = "",
        **generate_kwargs: Any,
    ) -> str | list[str]:
        """Answer from the sentences `retrieve` keeps; other keywords go to `model.generate`. Raises InputError."""
        found = self.retrieve(
            model, context, question, tokenizer=tokenizer, state_file=state_file, progress=progress,
            answer_prefix=answer_prefix,
        )  # fmt: skip
        return self.answer(model, found, tokenizer=tokenizer, **generate_kwargs)

    def rank_layers(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        question: str = "What is the secret code for {key}?",
        probes: int = 8,
        seed: int = 0,
    ) -> list[tuple[int, float]]:
        """Which layer to take: `(layer, score)`, best first, from needles hidden in one chunk of made-up text.

        The score is the mean of 1 / (place of the needle's sentence when sentences are ordered by theirs), 1 at best.
        Ask with the model's own wording of questions, with {key} in it. Raises InputError.
        """
        from .layers import rank_layers

        return rank_layers(model, tokenizer, self.config, question, probes, seed)
