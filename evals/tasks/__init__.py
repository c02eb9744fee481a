"""Long-context tasks: offline, seeded, measured with the model's own tokenizer."""

from difflib import get_close_matches
from pathlib import Path

from hfpatch.text import grammar, labelled

from ..errors import EvaluationError
from . import facts
from .base import Sample, Task
from .perplexity import Bucket, PerplexityByPosition
from .retrieval import FactTask

__all__ = ["LM_EVAL_FOLDER", "Bucket", "PerplexityByPosition", "Sample", "Task", "get_task", "list_tasks"]

LM_EVAL_FOLDER = Path(__file__).parent / "lm_eval"

_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FactTask("single", "one needle in a haystack", grammar.single, {}, 16),
        FactTask("multi_key", "one needle among needles of other keys", grammar.multikey, {"distractors": 8}, 16),
        FactTask("multi_value", "all values of one key", facts.multi_value, {"values": 4, "distractors": 4}, 48),
        FactTask("multi_query", "several needles asked for at once", grammar.multineedle, {"count": 4}, 224),
        FactTask("passkey", "one number without a key", grammar.passkey, {}, 16),
        FactTask(
            "kv_retrieval", "one line of many `key: value` lines", facts.pairs, {"count": None}, 16, grow="count"
        ),
        FactTask(
            "line_retrieval",
            "the register content of one numbered line of many, as in LongEval",
            facts.registers,
            {"count": None},
            16,
            grow="count",
        ),
        FactTask(
            "variable_tracking",
            "a chain of assignments followed to its number",
            grammar.tracking,
            {"hops": 2, "chains": 2},
            64,
            ordered=True,
        ),
        FactTask(
            "common_words",
            "the most common words of a list",
            facts.common_words,
            {"rare": None, "common": 5},
            64,
            grow="rare",
        ),
        FactTask(
            "frequent_words",
            "the most frequent invented words",
            facts.frequent_words,
            {"words": None, "top": 3},
            48,
            grow="words",
            least=20,
        ),
        FactTask(
            "few_shot",
            "topic of a text after labelled examples",
            grammar.fewshot,
            {"shots": None},
            12,
            grow="shots",
            least=3,
            stop=(".", "\n"),
        ),
        *(
            FactTask(
                task.name,
                f"{task.name} of a sentence in ordinary English after labelled examples",
                task.fewshot,
                {"shots": None},
                12,
                grow="shots",
                least=len(task.labels),
                stop=(".", "\n"),
            )
            for task in labelled.TASKS.values()
        ),
        PerplexityByPosition(),
    )
}


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return list(_TASKS)


def get_task(name: str) -> Task:
    """The task called `name`. Raises EvaluationError with near names."""
    if name not in _TASKS:
        near = get_close_matches(name, _TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"tasks are {', '.join(_TASKS)}."
        raise EvaluationError(f"There is no task called {name!r:.200}; {hint}")
    return _TASKS[name]
