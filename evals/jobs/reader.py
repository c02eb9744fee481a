"""Facts in texts far beyond the window, for variants that read in chunks and variants given the whole text."""

import random
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from hfpatch import get_method
from hfpatch.api import Patch
from hfpatch.drives import Reads
from hfpatch.methods.infiniretri import InfiniRetriConfig
from hfpatch.runtime.positions import position_limit
from hfpatch.text import grammar
from hfpatch.text.needles import styled
from hfpatch.text.sources import sentences

from ..errors import EvaluationError
from ..run.cells import Cell, CellResult, Data, Session
from ..run.generation import complete
from ..run.models import Loaded, check_length
from ..run.peak import peak_reader, trim
from ..run.stats import memory_text, share, time_text, tokens
from ..run.variants import Variant
from ..tasks.answers import first_line, holds
from ..tasks.cutting import within
from ..tasks.frame import PLAIN, Frame, frame_of, style_of
from ..tasks.layout import count_tokens
from ..tasks.stream import stream
from .base import COUNT, DEPTHS, FLAG, HAYSTACK, LENGTHS, NUMBER, POSITIVE, TEXT, Job, keys, setting
from .registry import register_job
from .scores import INTERVALS, bounded, by_length, interval_text, percent, score_map, score_numbers
from .task import CHAT, CHAT_HELP, NEEDLE, NEEDLE_HELP
from .view import Row, Table, TableCell, View, heading, lengths_of, names_of

FACTS = {"enum": ["needle", "tracking"]}
AT_MOST = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 16, "maximum": 100000000}}


@dataclass(frozen=True)
class Question:
    """Facts with their depths in [0, 1], the turn that asks for the answer, and a name for its place."""

    facts: list[str]
    depths: list[float]
    turn: str
    answer: str
    rng: random.Random
    depth: float
    index: int


@register_job
@dataclass(frozen=True)
class ReaderJob(Job):
    """Settings: text lengths in tokens, depths in percent, samples per depth.

    `facts`: one "needle" at the depth, or "tracking", a chain of assignments spread over the text and followed
    backwards (`depths` then only count samples). `at_most` keeps a variant from texts longer than that; a variant
    that does not read in chunks gets the text as one prompt, with `cut` without the middle that its positions have no
    room for. What it takes is not estimated: a reader takes time in proportion to the text, not to its square.
    """

    kind = "reader"
    about = "Facts in texts beyond the window; methods that read in chunks get the text as a stream."
    row = keys(
        variant=TEXT, length=POSITIVE, depth=NUMBER, score=NUMBER, samples=POSITIVE,
        kept={"type": ["number", "null"]}, chunks={"type": ["integer", "null"]}, seconds=NUMBER, peak=NUMBER,
    )  # fmt: skip

    lengths: Sequence[int] = setting(LENGTHS)
    depths: Sequence[float] = setting(DEPTHS, (0, 25, 50, 75, 100))
    samples: int = setting(COUNT, 1, "Per length and depth.")
    haystack: str = setting(HAYSTACK, "grammar")
    facts: str = setting(FACTS, "needle", "One needle, or a chain of assignments all over the text.")
    at_most: Mapping[str, int] = setting(AT_MOST, {}, "Longest text for a variant, by its name.")
    cut: bool = setting(
        FLAG, False, "Cut the middle out of one-prompt texts that are longer than the model's positions."
    )
    chat: bool | None = setting(CHAT, None, CHAT_HELP)
    needle: str | None = setting(NEEDLE, None, NEEDLE_HELP)
    label: str = "reader"

    def cells(self, variants: Sequence[Variant]) -> list[Cell]:
        """One cell per length and variant, the short ones first."""
        names = [v.name for v in variants]
        for name in self.at_most:
            if name not in names:
                raise EvaluationError(
                    f"at_most names {name!r:.99}, which is no variant; these are {', '.join(names)}."
                )
        return [Cell(self.label, v, n) for n in sorted(self.lengths) for v in names if n <= self.at_most.get(v, n)]

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Texts."""
        return len(self.depths) * self.samples

    def check(self, cell: Cell, session: Session) -> None:
        """Text and question have to fit where they are one prompt and neither cut nor allowed to be longer."""
        variant, chat = _laid_out(session.variant(cell.variant), self.chat)
        if self.cut or cell.variant in self.at_most or _reads(variant):
            return
        loaded = session.loaded
        frame, style = frame_of(loaded.tokenizer, chat), style_of(loaded.tokenizer, self.needle)
        asked = list(self.questions(cell.length, session.seed, style))
        longest = max(_around(loaded, frame, one.turn) for one in asked)
        check_length(loaded, cell.length, max(_room(loaded, frame, one) for one in asked), asked=longest)

    def questions(self, length: int, seed: int, style: str = "grammar") -> Iterator[Question]:
        """All questions of one length, said in a style of hfpatch.text.needles; the same for every variant."""
        for depth in self.depths:
            for index in range(self.samples):
                rng = random.Random(f"{self.label}-{seed}-{length}-{depth}-{index}")
                if self.facts == "tracking":
                    asked = grammar.tracking(rng)
                    places = sorted(rng.random() for _ in asked.facts)
                    question, answer = asked.turns[0]
                    yield Question(asked.facts, places, question, answer.strip(" ."), rng, depth / 100, index)
                    continue
                key, value = grammar.random_key(rng), grammar.random_value(rng)
                plain = grammar.Task([grammar.needle(key, value)], [(grammar.question(key), f" {value}")])
                told = styled(plain, style, rng)
                yield Question(told.facts, [depth / 100], told.turns[0][0], value, rng, depth / 100, index)

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Answer every question of one length under one variant."""
        loaded, (variant, chat) = session.loaded, _laid_out(session.variant(cell.variant), self.chat)
        frame, style = frame_of(loaded.tokenizer, chat), style_of(loaded.tokenizer, self.needle)
        reads, records = _reads(variant), []
        with variant.applied(loaded.model) as patch:
            for asked in self.questions(cell.length, session.seed, style):
                record = self._one(loaded, patch if reads else None, cell, asked, frame)
                records.append({**record, "chat": frame != PLAIN, "needle": style})
                session.step()
        data = {
            "grid": [self._point(depth / 100, records) for depth in self.depths],
            "reads_in_chunks": reads,
            "question_in_sparse_part": variant.question_in_sparse_part and not reads,
        }
        return CellResult(data, records)

    def _one(self, loaded: Loaded, patch: Patch | None, cell: Cell, asked: Question, frame: Frame) -> Data:
        room = _room(loaded, frame, asked)
        source = sentences(self.haystack, asked.rng)
        pieces = stream(loaded.tokenizer, asked.facts, asked.depths, source, cell.length)
        trim()
        reader = peak_reader(loaded.device)
        reader.reset()
        before, start, busy = reader.now(), time.perf_counter(), time.process_time()
        found: Data = {}
        if patch is None:
            prompt = self._prompt(loaded, "".join(pieces).rstrip(), frame, asked.turn, room)
            output = complete(loaded.model, loaded.tokenizer, [prompt], room)[0]
        else:
            output, found = _read(loaded, patch, pieces, asked, frame, room)
        took = {"seconds": time.perf_counter() - start, "busy_seconds": time.process_time() - busy}
        return {
            "job": self.label, "variant": cell.variant, "length": cell.length, "depth": asked.depth,
            "index": asked.index, "expected": asked.answer, "output": output,
            "score": float(holds(first_line(output), asked.answer)), **found, **took, "peak": reader.peak() - before,
        }  # fmt: skip

    def _prompt(self, loaded: Loaded, text: str, frame: Frame, turn: str, room: int) -> str:
        """The whole text, or what the model's positions leave of it, with the question after it."""
        limit, tail = position_limit(loaded.model), "\n" + frame.tail(turn)
        if self.cut and limit:
            text = within(loaded.tokenizer, text, limit - _around(loaded, frame, turn) - room)
        return frame.before + text + tail

    @staticmethod
    def _point(depth: float, records: Sequence[Data]) -> Data:
        own = [r for r in records if r["depth"] == depth]
        kept = [r["kept"] for r in own if "kept" in r]
        return {
            "depth": depth, "score": mean(r["score"] for r in own), "samples": len(own),
            "kept": mean(kept) if kept else None, "chunks": own[0].get("chunks"),
            "seconds": mean(r["seconds"] for r in own), "busy_seconds": mean(r["busy_seconds"] for r in own),
            "peak": max(r["peak"] for r in own),
        }  # fmt: skip

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per variant, length and depth."""
        shared = ("reads_in_chunks", "question_in_sparse_part")
        return [
            bounded({"variant": cell.variant, "length": cell.length, **point, **{k: data[k] for k in shared}})
            for cell, data in done.items()
            for point in data["grid"]
        ]

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Answers found by length, and what the longest texts took."""
        rows = entry["rows"]
        header = ["variant", *map(tokens, lengths_of(rows)), "facts kept", "per text"]
        return View(
            heading("Facts beyond the window", entry),
            "A fact is hidden at a given depth of a text that may be far longer than the model's window. A variant "
            "that reads in chunks gets the text as a stream and answers from the sentences it kept; the others get it "
            "as one prompt. Each square is the share of answers found.",
            Table("answers found (all depths)", header, [_line(rows, name) for name in names_of(rows)]),
            score_map(rows, "answers found"), score_numbers(rows),
            [INTERVALS, "Facts kept, chunks, time and peak memory are those of the variant's longest texts."],
        )  # fmt: skip


def _room(loaded: Loaded, frame: Frame, asked: Question) -> int:
    """New tokens that the answer may take."""
    return count_tokens(loaded.tokenizer, f" {asked.answer}") + (2 if frame == PLAIN else 8)


def _around(loaded: Loaded, frame: Frame, turn: str) -> int:
    """Tokens of the prompt beside the text."""
    return count_tokens(loaded.tokenizer, frame.before + "\n" + frame.tail(turn))


def _line(rows: Sequence[Row], name: str) -> list[str | TableCell]:
    own = [r for r in rows if r["variant"] == name]
    last = [r for r in own if r["length"] == max(r["length"] for r in own)]
    kept = [r["kept"] for r in last if r["kept"] is not None]
    found: list[str | TableCell] = []
    for length in lengths_of(rows):
        here = [r for r in own if r["length"] == length]
        found.append(TableCell(share(here), interval_text(*by_length(here)[name, length][1:])) if here else "")
    return [
        name, *found, TableCell(percent(mean(kept)) if kept else "-", _chunks(last[0]["chunks"])),
        TableCell(time_text(mean(r["seconds"] for r in last)), memory_text(max(r["peak"] for r in last))),
    ]  # fmt: skip


def _chunks(number: int | None) -> str:
    return f"{number} chunk{'s' if number > 1 else ''}" if number else ""


def _reads(variant: Variant) -> bool:
    """Whether a method of the variant reads in chunks."""
    return any(issubclass(get_method(c.method), Reads) for c in (variant.config.methods if variant.config else ()))


def _laid_out(variant: Variant, chat: bool | None) -> tuple[Variant, bool | None]:
    """The variant, and whether its prompts are chats: as the job says, else as the method that lays them out does."""
    methods = variant.config.methods if variant.config else []
    own = [c for c in methods if isinstance(c, InfiniRetriConfig)]
    if variant.config is None or not own:
        return variant, chat
    if chat is None:
        return variant, own[0].chat
    told = [replace(c, chat=chat) if isinstance(c, InfiniRetriConfig) else c for c in methods]
    return replace(variant, config=replace(variant.config, methods=told)), chat


def _read(
    loaded: Loaded, patch: Patch, pieces: Iterator[str], asked: Question, frame: Frame, room: int
) -> tuple[str, Mapping[str, Any]]:
    question, begun = frame.parts(asked.turn)
    found = patch.retrieve(pieces, question, tokenizer=loaded.tokenizer, progress=False, answer_prefix=begun)
    output = patch.answer(found, tokenizer=loaded.tokenizer, max_new_tokens=room, do_sample=False)
    kept = {
        "kept": mean(float(f in found.text) for f in asked.facts), "chunks": found.chunks,
        "kept_tokens": found.path[-1]["kept_tokens"],
    }  # fmt: skip
    return output, kept
