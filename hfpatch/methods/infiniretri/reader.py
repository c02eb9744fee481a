"""The reading loop: one forward per chunk, kept sentences go in front of the next."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import InputError
from ...runtime.positions import position_limit, position_table
from .prompt import Prompt, left_padded, make_prompt, tokenize
from .scores import QuestionView, Seen
from .sentences import Encoded, Sentence, chunks, faithful_end, plain_end, sentences
from .state import ItemState, Kept, read_state, write_state

Context = str | Iterable[str]


@dataclass
class Retrieval:
    """What one question kept of its context, and how it got there: one entry of `path` per chunk."""

    question: str
    kept: list[Kept] = field(default_factory=list)
    path: list[dict[str, Any]] = field(default_factory=list)
    answer_prefix: str = ""

    @property
    def text(self) -> str:
        """The kept sentences in the context's order."""
        return "".join(k.text for k in self.kept)

    @property
    def chunks(self) -> int:
        """Chunks read."""
        return len(self.path)


@dataclass(eq=False)
class _Item:
    """One question on its way through its context."""

    prompt: Prompt
    result: Retrieval
    kept: list[Encoded] = field(default_factory=list)
    weights: Tensor | None = None


class Reader:
    """Runs the loop for one model and tokenizer; `capture` is where the method puts the question's view."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: Any, capture: Any) -> None:
        if tokenizer is None or not callable(tokenizer):
            raise InputError("Pass the model's tokenizer: retrieve(context, question, tokenizer=tokenizer).")
        self.model: Any = model
        self.tokenizer, self.settings, self.capture = tokenizer, settings, capture
        self.faithful = settings.mode == "faithful"
        self.table = position_table(model)
        self.window = self.table or position_limit(model)

    def retrieve(
        self,
        context: Context | list[str],
        question: str | list[str],
        state_file: str | None,
        progress: bool,
        answer_prefix: str,
    ) -> Retrieval | list[Retrieval]:
        """See InfiniRetri.retrieve."""
        single = isinstance(question, str)
        asked = [question] if isinstance(question, str) else question if isinstance(question, list) else []
        if not asked or not all(isinstance(x, str) and x.strip() for x in asked):
            raise InputError("Ask a question: a non-empty string, or a list of them.")
        if not isinstance(answer_prefix, str):
            raise InputError("answer_prefix is the text that every answer begins with; pass a string.")
        if isinstance(context, list):
            if len(context) != len(asked):
                raise InputError(f"{len(context)} contexts and {len(asked)} questions do not pair up.")
            streams = [(c, [self._item(x, answer_prefix)]) for c, x in zip(context, asked, strict=True)]
        else:
            streams = [(context, [self._item(x, answer_prefix) for x in asked])]
        for n, (source, items) in enumerate(streams):
            where = None if state_file is None else Path(f"{state_file}.{n}" if len(streams) > 1 else state_file)
            self._read(source, items, where, progress)
        results = [item.result for _, items in streams for item in items]
        return results[0] if single else results

    def answer(self, found: list[Retrieval], generate_kwargs: dict[str, Any]) -> list[str]:
        """Generate from the kept sentences of each retrieval."""
        if not found or not all(isinstance(r, Retrieval) for r in found):
            raise InputError("Answer takes what retrieve(...) gave back, or a list of such.")
        rows = []
        for r in found:
            prompt = self._prompt(r.question, r.answer_prefix)
            rows.append(prompt.ids([t for k in r.kept for t in tokenize(self.tokenizer, k.text)]))
        self._check_room(rows, generate_kwargs.get("max_new_tokens") or 1)
        batch = left_padded(rows, self._pad(), self.model.device)
        batch.pop("position_ids")
        with torch.no_grad():
            out = self.model.generate(**batch, **generate_kwargs)
        new = out[:, batch["input_ids"].shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]

    def _prompt(self, question: str, answer_prefix: str) -> Prompt:
        s = self.settings
        return make_prompt(self.tokenizer, s.template, question, s.chat, answer_prefix)

    def _item(self, question: str, answer_prefix: str) -> _Item:
        prompt = self._prompt(question, answer_prefix)
        if not prompt.tail:
            raise InputError(f"The question {question!r:.60} has no tokens.")
        if self.window is not None and prompt.size + 64 > self.window:
            raise InputError(
                f"The question takes {prompt.size} tokens of the model's {self.window}; ask a shorter one."
            )
        return _Item(prompt, Retrieval(question, answer_prefix=answer_prefix))

    def _check_room(self, rows: list[list[int]], new_tokens: int) -> None:
        """Raise InputError when the model's table of positions, if it has one, ends before the last new token."""
        longest = max(map(len, rows))
        if self.table is not None and longest + new_tokens - 1 > self.table:
            raise InputError(
                f"A prompt of {longest} tokens and {new_tokens} new do not fit into the model's {self.table} "
                "positions; lower chunk_tokens, keep_budget or max_new_tokens."
            )

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    def _room(self, items: list[_Item]) -> tuple[int, int | None]:
        """Tokens a chunk may have and tokens that may be kept, within the model's positions."""
        chunk, keep = self.settings.chunk_tokens, None if self.faithful else self.settings.keep_budget
        if self.window is not None:
            free = self.window - max(i.prompt.size for i in items)
            chunk = min(chunk, free * 3 // 4)
            keep = free - chunk if keep is None and not self.faithful else keep and min(keep, free - chunk)
        return chunk, keep

    def _read(self, context: Context, items: list[_Item], where: Path | None, progress: bool) -> None:
        if isinstance(context, bytes) or not isinstance(context, Iterable):
            raise InputError(f"The context is a {type(context).__name__}; pass a string or an iterator of strings.")
        offset = self._resume(items, where)
        chunk_tokens, keep = self._room(items)
        source = sentences(
            _pieces(context, offset), chunk_tokens * 4, faithful_end if self.faithful else plain_end, offset
        )
        steps = chunks(source, lambda text: tokenize(self.tokenizer, text), chunk_tokens)
        for chunk in tqdm(steps, desc="reading", unit="chunk", disable=not progress):
            self._step(items, chunk, keep)
            self._save(items, where, chunk[-1].sentence.end)
        if not any(i.result.path for i in items):
            raise InputError("The context is empty; pass some text to read.")

    @torch.no_grad()
    def _step(self, items: list[_Item], chunk: list[Encoded], keep: int | None) -> None:
        contexts = [[*item.kept, *chunk] for item in items]
        rows = [i.prompt.ids([t for e in c for t in e.ids]) for i, c in zip(items, contexts, strict=True)]
        self._check_room(rows, 1)
        self.capture.questions = {n: len(item.prompt.tail) for n, item in enumerate(items)}
        self.capture.views = {}
        self.capture.stop = getattr(self.model, "hf_device_map", None) is None
        try:
            batch = left_padded(rows, self._pad(), self.model.device)
            with contextlib.suppress(Seen):
                self.model(**batch, use_cache=False, logits_to_keep=1)
            views = self.capture.views
        finally:
            self.capture.questions, self.capture.views = None, {}
        for n, item in enumerate(items):
            if n not in views:
                raise InputError("The capturing layer ran no call that could be read; see get_patch(model).report().")
            self._keep(item, contexts[n], chunk, views[n], keep)

    def _keep(
        self, item: _Item, context: list[Encoded], chunk: list[Encoded], view: QuestionView, keep: int | None
    ) -> None:
        """Choose the sentences that hold one of the best tokens, the best first when a budget is set."""
        s = self.settings
        if item.weights is None or not self.faithful:
            item.weights = view.question_weights() if s.question_weights else None
        start = len(item.prompt.head)
        owner = torch.tensor([n for n, e in enumerate(context) for _ in e.ids], device=view.weights.device)
        scores = view.token_scores(start, start + len(owner), s.phrase, item.weights)
        best = torch.zeros(len(context), device=scores.device).scatter_reduce_(0, owner, scores, "amax")
        top = owner[scores.topk(min(s.top_tokens, len(owner))).indices].unique()
        order = top[best[top].argsort(descending=True)].tolist()
        used, chosen = 0, list[int]()
        for n in order:
            used += len(context[n].ids)
            if keep is not None and used > keep and chosen:
                used -= len(context[n].ids)
                continue
            chosen.append(n)
        chosen.sort()
        item.kept = [context[n] for n in chosen]
        item.result.kept = [
            Kept(e.sentence.text, e.sentence.start, e.sentence.end, float(best[n]))
            for n, e in zip(chosen, item.kept, strict=True)
        ]
        span = (chunk[0].sentence.start, chunk[-1].sentence.end)
        item.result.path.append(
            {"start": span[0], "end": span[1], "tokens": len(owner), "kept": len(chosen), "kept_tokens": used}
        )

    def _fingerprint(self, items: list[_Item]) -> dict[str, Any]:
        prefix = items[0].result.answer_prefix
        return {
            "settings": self.settings.to_dict(), "questions": [i.result.question for i in items],
            **({"answer_prefix": prefix} if prefix else {}),
        }  # fmt: skip

    def _save(self, items: list[_Item], where: Path | None, offset: int) -> None:
        if where is not None:
            write_state(where, self._fingerprint(items), offset, [_dump(i) for i in items])

    def _resume(self, items: list[_Item], where: Path | None) -> int:
        if where is None or not where.exists():
            return 0
        offset, saved = read_state(where, self._fingerprint(items))
        for item, state in zip(items, saved, strict=True):
            _load(item, state, self.tokenizer)
        return offset


def _dump(item: _Item) -> ItemState:
    return ItemState(item.result.kept, item.result.path, None if item.weights is None else item.weights.tolist())


def _load(item: _Item, state: ItemState, tokenizer: Any) -> None:
    item.result.kept, item.result.path = state.kept, state.path
    item.weights = None if state.weights is None else torch.tensor(state.weights)
    item.kept = [Encoded(Sentence(k.text, k.start, k.end), tuple(tokenize(tokenizer, k.text))) for k in state.kept]


def _pieces(context: Context, skip: int) -> Iterator[str]:
    """The context from character `skip` on, in pieces of bounded size."""
    size = 1 << 16
    for piece in [context] if isinstance(context, str) else context:
        if not isinstance(piece, str):
            raise InputError(f"The context yields {type(piece).__name__}; every piece has to be a string.")
        if skip >= len(piece):
            skip -= len(piece)
            continue
        for a in range(skip, len(piece), size):
            yield piece[a : a + size]
        skip = 0
