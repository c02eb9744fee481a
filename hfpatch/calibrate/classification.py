"""Prompts with one right label each, and what a model answers to them in its next token."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..files.json_text import json_lines
from ..text.labelled import TASKS
from ..text.prompt_ids import prompt_ids
from .fewshot import PLAIN, TABLES, fewshot_prompts, file_rows, task_prompts
from .prefix import grouped, last_logits
from .unfinished import data_mark

RENAMED = {"animal": "river", "plant": "lemon", "tool": "tiger", "place": "hammer"}
_LABEL = re.compile(r"Topic: (\w+)\.")


@dataclass(frozen=True)
class Example:
    """A prompt that ends right before its answer; labels and answer start with the space, where there is one."""

    prompt: str
    labels: tuple[str, ...] = ()
    answer: str | None = None
    blanks: tuple[str, ...] = ()  # the prompt with texts that mean nothing


def read_examples(path: str | Path) -> list[Example]:
    """Examples from JSON lines with `prompt` and, for supervised use, `answer` and `labels`. Raises ConfigError."""
    return _examples([(f"{path}, line {n}", row) for n, row in json_lines(Path(path))], str(path))


def make_examples(rows: Iterable[dict[str, Any]], where: str) -> list[Example]:
    """Examples from dicts; without `labels`, all answers of the data are the labels. Raises ConfigError."""
    return _examples([(where, row) for row in rows], where)


def _examples(rows: Sequence[tuple[str, Any]], where: str) -> list[Example]:
    if not rows:
        raise ConfigError(f"{where} holds no examples; every line needs a 'prompt'.")
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise ConfigError(f"{place}: every line needs a 'prompt'.")
        if not isinstance(row.get("answer"), str | None):
            raise ConfigError(f"{place}: 'answer' is not text.")
        for name in ("labels", "blanks"):
            texts = row.get(name) or []
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ConfigError(f"{place}: {name!r} is not a list of texts.")
    every = tuple(sorted({r["answer"] for _, r in rows if r.get("answer") is not None}))
    return [
        Example(r["prompt"], tuple(r.get("labels") or every), r.get("answer"), tuple(r.get("blanks") or ()))
        for _, r in rows
    ]


def hub_examples(
    name: str, split: str, count: int, prompt: str, answer: str, names: Sequence[str] = ()
) -> list[Example]:
    """`count` examples drawn from a Hub data set: `prompt` is a template over its fields, `answer` a field.

    `names` are the labels' texts by number, for fields that hold numbers. Needs the extra `eval`. Raises ConfigError.
    """
    from datasets import load_dataset

    rows = []
    try:
        data = load_dataset(name, split=split).shuffle(seed=0)
        for row in data.select(range(min(count, len(data)))):
            value = row[answer]
            rows.append({"prompt": prompt.format(**row), "answer": names[value] if names else f" {value}"})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"Cannot take examples from the data set {name!r:.200} ({type(error).__name__}: {error!s:.200}); check "
            "--split, --prompt, --answer and --names, or give a file of JSON lines."
        ) from error
    return make_examples(rows, name)


def embedded_examples(count: int, shots: int = 6, seed: int = 0, renamed: bool = False) -> list[Example]:
    """Topic classification from the embedded model's own templates, with `shots` labelled texts in the prompt.

    `renamed` calls the topics by unrelated words, so that only the labelled texts tell the answer.
    """
    from ..text.grammar import TOPICS, fewshot

    called = {topic: RENAMED.get(topic, topic) if renamed else topic for topic in TOPICS}
    out = []
    for n in range(count):
        task = fewshot(random.Random(f"calibrate-{seed}-{n}"), shots)
        question, answer = task.turns[0]
        prompt = "".join(f" {part}" for part in (*task.facts, question))
        shown = set(_LABEL.findall(prompt)) | {answer.strip(" .")} if shots >= len(TOPICS) - 1 else set(TOPICS)
        prompt = _LABEL.sub(lambda m: f"Topic: {called[m[1]]}.", prompt)
        labels = tuple(sorted(f" {called[topic]}" for topic in shown))
        out.append(Example(prompt, labels, f" {called[answer.strip(' .')]}"))
    return out


@dataclass(frozen=True)
class Source:
    """Where a calibration's examples come from: 'embedded', a task of sentences, a file, or a Hub data set."""

    data: str = "embedded"
    split: str = "train"
    prompt: str = "{text}"
    answer: str = "label"
    names: str = ""
    shots: int = 6
    renamed: bool = False

    def load(self, count: int) -> list[Example]:
        """At most `count` examples. Raises ConfigError."""
        if self.data == "embedded":
            return embedded_examples(count, self.shots, renamed=self.renamed)
        if self.data in TASKS:
            return make_examples(task_prompts(self.data, count, self.shots), self.data)
        labels = [f" {n.strip()}" for n in self.names.split(",")] if self.names else []
        if Path(self.data).suffix in (".jsonl", ".json", *TABLES):
            return self._from_file(count, labels)
        return hub_examples(self.data, self.split, count, self.prompt, self.answer, labels)

    def _from_file(self, count: int, labels: Sequence[str]) -> list[Example]:
        """Prompts as they stand in JSON lines, or made from texts and labels."""
        path = Path(self.data)
        rows = file_rows(path)
        told = rows and all(isinstance(row, dict) and "prompt" not in row and self.answer in row for row in rows)
        if not told and path.suffix not in TABLES:
            return read_examples(path)[:count]
        template = "Text: {text}\nLabel:" if self.prompt == PLAIN else self.prompt
        made = fewshot_prompts(rows, template, self.answer, self.shots, count, names=labels)
        return make_examples(made, self.data)


@dataclass(frozen=True, eq=False)
class Answers:
    """Next-token behaviour per example: greedy token, log-probabilities of all labels `[N, C]`, entropy `[N]`."""

    token: Tensor
    labels: Tensor
    entropy: Tensor


def supervised(examples: Sequence[Example]) -> bool:
    """Whether every example has an answer that is one of its labels."""
    return all(e.answer is not None and e.answer in e.labels for e in examples)


class Questions:
    """Examples as tokens, in batches of equal length.

    `share` runs once what many prompts begin with: for patches under which a token's keys depend on earlier ones only.
    """

    def __init__(self, tokenizer: Any, examples: Sequence[Example], batch: int = 32, *, share: bool = False) -> None:
        self.examples = list(examples)
        self.supervised = supervised(examples)
        names = sorted({label for e in examples for label in e.labels})
        self.names = names
        self.first = torch.tensor([self._first(tokenizer, n) for n in names], dtype=torch.long)
        if len(set(self.first.tolist())) < len(names):
            raise ConfigError("Two labels begin with the same token; choose labels that differ in their first token.")
        self.allowed = torch.tensor([[n in e.labels for n in names] for e in examples]).reshape(len(examples), -1)
        right = [names.index(e.answer) if e.answer in names else -1 for e in examples]
        self.right = torch.tensor(right, dtype=torch.long)
        self.groups = grouped([prompt_ids(tokenizer, e.prompt) for e in examples], batch, share)

    @staticmethod
    def _first(tokenizer: Any, label: str) -> int:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError(f"The label {label!r} has no token.")
        return int(ids[0])

    def __len__(self) -> int:
        return len(self.examples)

    def mark(self) -> str:
        """A digest of all examples and their tokens."""
        tensors = [t for g in self.groups for b in g.batches for t in (g.prefix, b.rows, b.ids, b.ends)]
        return data_mark(tensors, [astuple(e) for e in self.examples])

    def check(self, model: Any) -> None:
        """Raise ConfigError at a prompt for which the model has no positions, or that has no token."""
        config = getattr(model, "config", None)
        limit = getattr(config and config.get_text_config(), "max_position_embeddings", None)
        if min((g.shortest for g in self.groups), default=1) < 1:
            raise ConfigError("A prompt has no tokens; leave it out.")
        longest = max((g.longest for g in self.groups), default=0)
        if limit and longest > limit:
            raise ConfigError(f"A prompt has {longest} tokens; the model has positions for {limit}.")

    @torch.inference_mode()
    def ask(self, model: nn.Module) -> Answers:
        """The model's next-token answers, as it is patched now."""
        n = len(self)
        token, labels, entropy = torch.zeros(n, dtype=torch.long), torch.zeros(n, len(self.names)), torch.zeros(n)
        for rows, last in chain.from_iterable(last_logits(model, group) for group in self.groups):
            log = last.log_softmax(-1)
            token[rows], labels[rows] = log.argmax(-1), log[:, self.first]
            entropy[rows] = -(log.exp() * log).sum(-1)
        return Answers(token, labels, entropy)

    def right_now(self, a: Answers) -> Tensor:
        """Bool `[N]`: the greedy token begins the right label."""
        return a.token == self.first[self.right]

    def valid(self, a: Answers) -> Tensor:
        """Bool `[N]`: the greedy token begins one of the example's labels."""
        return ((a.token[:, None] == self.first) & self.allowed).any(-1)

    def right_among_labels(self, a: Answers, prior: Tensor | None = None) -> Tensor:
        """Bool `[N]`: the right label is the likeliest of the labels, each less its log-prior `[C]` if given."""
        score = a.labels if prior is None else a.labels - prior
        return score.masked_fill(~self.allowed, -torch.inf).argmax(-1) == self.right

    def prior(self, a: Answers, rows: Tensor) -> Tensor:
        """Mean log-probability `[C]` of every label over the examples `rows` that allow it, answers unseen."""
        allowed = self.allowed[rows].float()
        return (a.labels[rows] * allowed).sum(0) / allowed.sum(0).clamp(min=1)

    def log_likelihood(self, a: Answers) -> Tensor:
        """Log-probability `[N]` of the right label's first token."""
        return a.labels.gather(-1, self.right.clamp(min=0)[:, None])[:, 0]


def measures(q: Questions, a: Answers, rows: Tensor) -> dict[str, Any]:
    """Accuracy, share of invalid answers, accuracy among valid ones and among labels only, entropy."""
    found: dict[str, Any] = {"entropy": float(a.entropy[rows].mean())}
    if not q.supervised:
        return found
    right, valid = q.right_now(a)[rows].float(), q.valid(a)[rows].float()
    return {
        "accuracy": float(right.mean()),
        "invalid": float(1 - valid.mean()),
        "accuracy_of_valid": float((right * valid).sum() / valid.sum()) if valid.any() else None,
        "accuracy_among_labels": float(q.right_among_labels(a)[rows].float().mean()),
        "log_likelihood": float(q.log_likelihood(a)[rows].mean()),
        **found,
    }
