"""results.json of a run, read back and held to the schema of every kind of job in it."""

from pathlib import Path
from typing import Any

from hfpatch.files.json_text import load_json

from ..errors import EvaluationError
from ..jobs.registry import job_kinds
from ..run.journal import JOURNAL, Journal
from ..run.results import RESULTS, SAMPLES, environment, write_jsonl
from ..schema import by_kind, first_problem, load_schema

__all__ = [
    "JOURNAL", "RESULTS", "SAMPLES", "Journal", "environment", "read_results", "results_schema", "write_jsonl",
]  # fmt: skip


def results_schema() -> dict[str, Any]:
    """The file's schema, with what each kind of job says about its entry."""
    schema = load_schema("results.schema.json")
    kinds = job_kinds()
    job = schema["$defs"]["job"]
    job["properties"]["kind"] = {"enum": list(kinds)}
    job["allOf"] = by_kind("kind", {name: cls.entry_schema() for name, cls in kinds.items()})
    return schema


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run, with all that tables and pages need. Raises EvaluationError naming the place."""
    path = folder / RESULTS if folder.is_dir() else folder
    try:
        data = load_json(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise EvaluationError(f"There is no {RESULTS} in {folder}; name the folder a run has written to.") from error
    except ValueError as error:
        raise EvaluationError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict) or "jobs" not in data:
        raise EvaluationError(f"{path} was not written by hfpatch.")
    if problem := first_problem(results_schema(), data):
        raise EvaluationError(f"{path}: {problem} Restore the file, or start the run again.")
    return data
