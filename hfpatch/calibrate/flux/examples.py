"""Prompts with answers that `flux` routers are trained on, read from a file or generated."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...files.json_text import json_lines
from ...text.prompt_ids import prompt_ids

RETRIEVAL = ("single", "multikey", "kvlist", "passkey")
HOLISTIC = ("prose", "grammar", "copying")


@dataclass(frozen=True)
class Example:
    """A tokenised text `ids [L]`, the first position whose token is to be predicted, and the kind of task."""

    ids: Tensor
    predict_from: int
    kind: str


def read_examples(path: Path, tokenizer: Any, limit: int) -> Iterator[Example]:
    """Examples of a JSONL file with `prompt`, `answer` and `kind` (retrieval or holistic). Raises ConfigError."""
    for number, entry in json_lines(path):
        if not isinstance(entry, dict) or any(not isinstance(entry.get(k), str) for k in ("prompt", "answer", "kind")):
            raise ConfigError(f"{path}, line {number}: expected prompt, answer and kind, all of them text.")
        made = _example(tokenizer, entry["prompt"], entry["answer"], entry["kind"], limit)
        if made.predict_from >= len(made.ids):
            raise ConfigError(f"{path}, line {number}: the answer has no token to predict.")
        yield made


def built_in_examples(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Example]:
    """Half retrieval (needles, key-value lists), half holistic (prose, copying), about `length` tokens each."""
    found = []
    for n in range(count):
        rng = random.Random(f"flux-{seed}-{n}")
        task = rng.choice(HOLISTIC if n % 2 else RETRIEVAL)
        found.append(built_in_example(tokenizer, task, length, rng))
    return found


def built_in_example(tokenizer: Any, task: str, length: int, rng: random.Random) -> Example:
    """One example of a task of RETRIEVAL or HOLISTIC, or of any other retrieval task of the embedded model.

    `prose` and `grammar` are to be continued from half-way, `copying` says the last sentence again.
    """
    from ...text import grammar

    facts = grammar.TASKS[task](rng) if task not in HOLISTIC else None
    novels = task == "prose" or (task != "grammar" and rng.random() < 0.5)
    source = grammar.prose_sentences(rng) if novels else grammar.grammar_sentences(rng)
    room = length * 0.9 - (sum(_count(tokenizer, f) for f in facts.facts) if facts else 0)
    body: list[str] = []
    while room > 0:
        body.append(next(source))
        room -= _count(tokenizer, body[-1])
    if task == "copying":
        return _example(tokenizer, " ".join(body) + "\nAgain:", " " + body[-1], "holistic", length)
    if facts is None:
        half = len(body) // 2
        return _example(tokenizer, " ".join(body[:half]), " " + " ".join(body[half:]), "holistic", length)
    if facts.spread:
        places = sorted(rng.randint(0, len(body)) for _ in facts.facts)
        for place, fact in reversed(list(zip(places, facts.facts, strict=True))):
            body.insert(place, fact)
    else:
        body = facts.facts + body
    prompt, answer = rng.choice(facts.turns)
    return _example(tokenizer, " ".join(body) + "\n" + prompt, answer, "retrieval", length)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(" " + text, add_special_tokens=False)["input_ids"])


def _example(tokenizer: Any, prompt: str, answer: str, kind: str, limit: int) -> Example:
    head = prompt_ids(tokenizer, prompt)
    tail = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    ids = (head + tail)[-limit:]
    return Example(torch.tensor(ids), max(1, len(ids) - len(tail)), kind)
