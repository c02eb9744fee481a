"""The tasks as lm-eval sees them: documents made for the model's tokenizer, and their scores."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfpatch.text.scripts import words

from ..errors import EvaluationError
from ..testbed import CHECKPOINT
from . import get_task
from .base import Sample

EMBEDDED = "embedded"
QUARTERS = ("first", "second", "third", "last")


def docs(hfpatch_task: str, **metadata: Any) -> dict[str, Any]:
    """The test split of a task, from lm-eval's metadata and model arguments.

    Read are `tokenizer` or `pretrained`, `length` (tokens, one number or a list), `samples` per length, `seed` and the
    task's own options; other model arguments are ignored.
    """
    return _split([_doc(sample) for sample in _samples(hfpatch_task, metadata)])


def perplexity_docs(**metadata: Any) -> dict[str, Any]:
    """Each sample's prose in four parts of about equal length, each to be predicted from all before it."""
    rows = []
    for sample in _samples("perplexity_by_position", metadata):
        said = words(sample.prompt)
        edges = [round(len(said) * k / len(QUARTERS)) for k in range(len(QUARTERS) + 1)]
        for name, start, stop in zip(QUARTERS, edges, edges[1:], strict=False):
            context, told = "".join(said[:start]), "".join(said[start:stop])
            if told:
                rows.append({"context": context, "told": told, "quarter": name, "meta": _plain(sample.meta)})
    return _split(rows)


def score_doc(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of the document's answers in the generated text."""
    sample = Sample(doc["prompt"], list(doc["answers"]), doc["meta"])
    return {"score": get_task(doc["meta"]["task"]).score(results[0], sample)}


def perplexity_of_doc(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood and words, for all of the text and for the document's quarter of it."""
    value = (float(results[0][0] if isinstance(results[0], tuple) else results[0]), len(words(doc["told"])))
    quarters = {f"ppl_{name}": value if name == doc["quarter"] else (0.0, 0) for name in QUARTERS}
    return {"ppl": value, **quarters}


def word_perplexity(values: Sequence[tuple[float, int]]) -> float:
    """exp of the mean negative log-likelihood per word; a character counts where words are written together."""
    count = sum(n for _, n in values)
    if not count:
        return math.nan
    try:
        return math.exp(-sum(x for x, _ in values) / count)
    except OverflowError:
        return math.inf


def _samples(name: str, metadata: dict[str, Any]) -> list[Sample]:
    task, tokenizer = get_task(name), _tokenizer(metadata)
    options = {k: v for k, v in metadata.items() if k in task.options}
    lengths = metadata.get("length", 1024)
    lengths = lengths if isinstance(lengths, list | tuple) else [lengths]
    count, seed = int(metadata.get("samples", 20)), int(metadata.get("seed", 0))
    return [s for length in lengths for s in task.samples(tokenizer, int(length), count, seed, **options)]


def _doc(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt, "answers": sample.answers, "meta": _plain(sample.meta)}


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    return {"depth": None, **meta}


def _split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        if isinstance(name, PreTrainedTokenizerBase):
            return name
        raise EvaluationError(
            "These tasks measure length with the model's tokenizer; pass --metadata tokenizer=NAME, or from Python "
            "TaskManager(metadata={'tokenizer': NAME}, ...)."
        )
    revision, trust = str(metadata.get("revision", "main")), bool(metadata.get("trust_remote_code", False))
    return _load(str(CHECKPOINT) if name == EMBEDDED else name, revision, trust)


@lru_cache(maxsize=2)
def _load(name: str, revision: str, trust: bool) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust)
