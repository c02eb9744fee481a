"""Prompts under lm-eval that end where the answer begins, and that are there from their first token on."""

from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..text.prompt_ids import special_around


class OpenPrompts:
    """To be mixed into lm-eval's `hf`: for causal models no special token follows a text.

    Prompts of this project's tasks are refused where lm-eval would cut their beginning off.
    """

    tokenizer: Any
    backend: str
    add_bos_token: bool | None
    max_length: int
    max_gen_toks: int

    @cached_property
    def _tail(self) -> list[int]:
        return special_around(self.tokenizer)[1] if self.backend == "causal" else []

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = super().tok_encode(string, *args, **kwargs)  # type: ignore[misc]
        plain = False in (kwargs.get("add_special_tokens"), self.add_bos_token)
        if plain or not self._tail or ids[-len(self._tail) :] != self._tail:
            return ids
        return ids[: -len(self._tail)]

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Token ids and mask `[B, L]` of texts, padded on the left."""
        tail = len(self._tail)
        if tail and kwargs.get("left_truncate_len"):
            kwargs["left_truncate_len"] += tail
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)  # type: ignore[misc]
        if tail and (ids[:, -tail:] == ids.new_tensor(self._tail)).all():
            return ids[:, :-tail], mask[:, :-tail]
        return ids, mask

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[str]:
        """Answers. Raises ConfigError for prompts of our tasks that leave no room for them."""
        for request in requests:
            self._check(request, int(request.args[1].get("max_gen_toks", self.max_gen_toks)))
        return super().generate_until(requests, *args, **kwargs)  # type: ignore[misc]

    def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihoods. Raises ConfigError for prompts of our tasks that are too long."""
        for request in requests:
            self._check(request, -1)
        return super().loglikelihood(requests, *args, **kwargs)  # type: ignore[misc]

    def _check(self, request: Any, room: int) -> None:
        meta = request.doc.get("meta") if isinstance(request.doc, dict) else None
        if not isinstance(meta, dict) or "requested" not in meta or meta["length"] + room <= self.max_length:
            return
        raise ConfigError(
            f"{request.task_name or 'the task'}: a prompt of {meta['length']} tokens"
            + (f" and {room} for the answer do" if room > 0 else " does")
            + f" not fit into the {self.max_length} the model takes, and its beginning would be cut off; lower "
            "`length`, or raise max_length where the model can go beyond."
        )
