"""Training samples: token ids, answer labels and position ids of every stage of the curriculum."""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from hfpatch.text import grammar

IGNORE, FILLER = -100, -101
HELD_OUT = ("emma", "moonstone", "great-expectations")


@dataclass(frozen=True)
class Stage:
    """What one stage of the curriculum draws: `rows` samples of `length` tokens, positions below `reach`.

    A diluted sample stands for a longer one: gaps in the positions, and a bias on filler keys for the missing.
    """

    length: int
    rows: int
    fill: float = 0.0
    tasks: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    per_sample: tuple[int, int] = (3, 4)
    induction: float = 0.0
    short: float = 0.0
    reach: int = 0
    dilute: bool = False


def read_books(folder: Path, held_out: Iterable[str] = HELD_OUT) -> list[str]:
    """Texts of the novels in a folder, without those kept for evaluation."""
    names = sorted(folder.glob("*.txt"))
    kept = [path for path in names if not any(name in path.name.lower() for name in held_out)]
    return [" ".join(path.read_text(encoding="utf-8").split()) for path in kept]


@dataclass(frozen=True)
class Batch:
    """Ids, labels (negative: not an answer), positions and logit bias of the keys, each (rows, length)."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    key_bias: torch.Tensor | None

    def to(self, device: str) -> "Batch":
        """On another device."""
        bias = None if self.key_bias is None else self.key_bias.to(device)
        return Batch(self.ids.to(device), self.labels.to(device), self.positions.to(device), bias)


class Sampler:
    """Draws samples of a stage from the grammar and, where given, from novels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, books: list[str], seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self._encode = tokenizer.backend_tokenizer.encode  # type: ignore[attr-defined]
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.vocab = len(tokenizer)
        self.topic = self.encode(" Topic:")
        draw = grammar.grammar_sentences(random.Random(seed + 1))
        self.grammar = [self.encode(" " + next(draw)) for _ in range(20_000)]
        share = 16_000_000 // max(1, len(books))
        self.prose: list[list[int]] = []
        for book in books:
            start = self.rng.randrange(max(1, len(book) - share))
            self.prose += [self.encode(" " + s) for s in grammar.split_sentences(book[start : start + share])]

    def encode(self, sentence: str) -> list[int]:
        """Token ids without `<s>`."""
        return list(self._encode(sentence, add_special_tokens=False).ids)

    def _filler(self, room: int) -> list[list[int]]:
        """Whole sentences of one source, `room` tokens at most."""
        prose = bool(self.prose) and self.rng.random() < 0.5
        index = self.rng.randrange(len(self.prose)) if prose else 0
        found: list[list[int]] = []
        misses = 0
        while room > 8 and misses < 4:
            sentence = self.prose[index % len(self.prose)] if prose else self.rng.choice(self.grammar)
            index += 1
            if len(sentence) > room:
                misses += 1
                continue
            found.append(sentence)
            room -= len(sentence)
        return found

    def _induction(self, length: int) -> tuple[list[int], list[int]]:
        """Random tokens that repeat; the repetition is the answer."""
        span = self.rng.randint(6, max(8, min(length // 3, 48)))
        block = [self.rng.randrange(3, self.vocab) for _ in range(span)]
        ids, labels = [self.bos], [IGNORE]
        while len(ids) < length:
            start = 0 if len(ids) == 1 else self.rng.randrange(span // 2)
            part = block[start:]
            labels += [IGNORE] * len(part) if len(ids) == 1 else [IGNORE, *part[1:]]
            ids += part
        return ids[:length], labels[:length]

    def _turns(self, tasks: list[grammar.Task], short: bool) -> tuple[list[int], list[int]]:
        """Questions and answers of several tasks in random order."""
        turns = [turn for task in tasks for turn in task.turns]
        self.rng.shuffle(turns)
        ids: list[int] = []
        labels: list[int] = []
        for index, (prompt, answer) in enumerate(turns):
            lead = "\n" if index else self.rng.choice((" ", "\n", "\n\n"))
            if short and "Answer: " in prompt:
                lead, prompt = " ", prompt.split("Answer: ")[1]
            asked, told = self.encode(lead + prompt), self.encode(answer)
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        return ids, labels

    def _recall(self, stage: Stage) -> tuple[list[int], list[int]]:
        """Facts of several tasks spread over one haystack, then all their questions."""
        names, weights = zip(*stage.tasks.items(), strict=True)
        count = self.rng.randint(*stage.per_sample)
        kinds = self.rng.choices(names, weights, k=count)
        if kinds[0] == "fewshot":
            kinds = ["fewshot"]
        once = [k for k in kinds if k not in ("passkey", "fewshot")]
        kinds = [*once, "passkey"] if "passkey" in kinds else once or kinds
        tasks = [grammar.TASKS[kind](self.rng) for kind in kinds]
        tail, tail_labels = self._turns(tasks, self.rng.random() < stage.short)
        facts = [[self.encode(" " + fact) for fact in task.facts] for task in tasks]
        used = 1 + len(tail) + sum(len(fact) for task in facts for fact in task)
        segments = self._filler(int((stage.length - used) * stage.fill))
        marked = [(segment, FILLER) for segment in segments]
        if tasks[0].spread:
            marked = self._spread(marked, facts)
        else:
            marked += [(fact, IGNORE) for fact in facts[0]]
        ids = [self.bos, *(token for segment, _ in marked for token in segment), *tail]
        labels = [IGNORE, *(mark for segment, mark in marked for _ in segment), *tail_labels]
        if not tasks[0].spread:
            marks = [i for i in range(len(ids) - 2) if ids[i : i + 2] == self.topic]
            for index in marks:
                labels[index + 2] = ids[index + 2]
        return ids, labels

    def _spread(
        self, segments: list[tuple[list[int], int]], facts: list[list[list[int]]]
    ) -> list[tuple[list[int], int]]:
        """Facts at random depths between the segments; facts of one task keep their order."""
        placed = [(float(i), segment) for i, segment in enumerate(segments)]
        for task in facts:
            depths = sorted(self.rng.uniform(-1, len(segments)) for _ in task)
            placed += [(depth, (fact, IGNORE)) for depth, fact in zip(depths, task, strict=True)]
        return [segment for _, segment in sorted(placed, key=lambda pair: pair[0])]

    def _positions(self, labels: list[int], total: int, most: int) -> list[int]:
        """Increasing positions with up to `most` jumps of `total` together, in the filler where there is some."""
        length = len(labels)
        places = [i for i, label in enumerate(labels) if label == FILLER] or list(range(1, length))
        count = int(most ** self.rng.random()) if total > 0 else 0
        cuts = sorted(self.rng.choice(places) for _ in range(count))
        shares = [self.rng.random() for _ in cuts]
        positions, offset, done = [], 0, 0
        for cut, share in zip(cuts, shares, strict=True):
            positions += [p + offset for p in range(done, cut)]
            offset, done = offset + int(total * share / sum(shares)), cut
        return positions + [p + offset for p in range(done, length)]

    def _stretch(self, stage: Stage, labels: list[int]) -> tuple[float, list[int]]:
        """Bias of the filler keys and positions of one sample."""
        length = len(labels)
        room = stage.reach - length
        if room <= 0 or self.rng.random() < 0.25:
            return 0.0, list(range(length))
        if not stage.dilute:
            return 0.0, self._positions(labels, int(16 * (max(room, 16) / 16) ** self.rng.random()), 3)
        times = (stage.reach / length) ** self.rng.random()
        bias = math.log(times) if self.rng.random() < 0.8 else 0.0
        return bias, self._positions(labels, min(room, int(length * times) - length), 64)

    def batch(self, stage: Stage) -> Batch:
        """A batch of the stage, padded on the right."""
        samples = []
        while len(samples) < stage.rows:
            if self.rng.random() < stage.induction:
                ids, labels = self._induction(stage.length)
            else:
                ids, labels = self._recall(stage)
            if len(ids) <= stage.length * 1.3:
                samples.append((ids, labels))
        length = max(len(ids) for ids, _ in samples)
        ids = torch.tensor([i + [self.pad] * (length - len(i)) for i, _ in samples])
        padded = [t + [IGNORE] * (length - len(t)) for _, t in samples]
        stretched = [self._stretch(stage, row) for row in padded]
        labels = torch.tensor(padded)
        bias = torch.tensor([[bias] for bias, _ in stretched]) * (labels == FILLER)
        positions = torch.tensor([positions for _, positions in stretched])
        return Batch(ids, labels, positions, bias if bias.any() else None)
