"""A text, a question, settings in small and a model that reads bytes."""

from typing import Any

import zoo
from tiny_tokenizer import VOCAB

TEXT = "".join(f"The {a} fox number {n} sleeps near the old mill. " for n, a in enumerate(["red", "blue", "odd"] * 14))
QUESTION = "Where does the blue fox sleep?"
SETTINGS: dict[str, Any] = {"chunk_tokens": 220, "top_tokens": 20, "phrase": 8, "keep_budget": 200}


def tiny(name: str = "llama", **extra: Any) -> Any:
    return zoo.SUPPORTED[name].build(vocab_size=VOCAB, **extra)
