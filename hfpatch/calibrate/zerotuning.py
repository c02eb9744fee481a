"""Searches the heads and the factor of `zerotuning` for a model and a classification task."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn

from ..api import patched
from ..cli.options import Device, Dtype, Model, number
from ..config.patch_config import PatchConfig
from ..errors import ConfigError
from ..files.output import own_folder, write_json
from ..methods.zerotuning import LEAST, MOST, ZeroTuningConfig
from ..runtime.model_facts import query_heads
from ..version import __version__
from .classification import Answers, Example, Questions, Source, measures, supervised
from .options import Answer, Batch, Count, Data, Names, Prompt, Renamed, Shots, Split
from .zerotuning_report import held_out, on_fresh, summary

SWEEP_FILE = "calibration.json"
OBJECTIVES = ("accuracy", "entropy")
Setting = tuple[float, tuple[int, ...]]


@dataclass(frozen=True)
class Search:
    """How to search. Probes and grid as in the paper's demonstration; the paper keeps the top 40 % of heads."""

    up: float = 2.0
    down: float = 0.5
    top: float = 0.4
    gammas: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
    held_out: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)
    random_draws: int = 3
    layers: int | str | list[int] | None = None


@dataclass
class Outcome:
    """What one objective chose on one split, and the held-out measures of it and its controls."""

    objective: str
    seed: int
    direction: str
    heads: list[int]
    gamma: float
    profile: list[dict[str, Any]]
    grid: list[dict[str, Any]]
    held_out: dict[str, Any] = field(default_factory=dict)

    @property
    def rise(self) -> float:
        """By how much the chosen factor raised accuracy where it was searched."""
        found = {g["gamma"]: g["accuracy"] for g in self.grid}
        return float(found[self.gamma] - found[1.0]) if found else 0.0


@dataclass
class Calibration:
    """All outcomes of a calibration, and every setting that was tried on the whole data."""

    search: Search
    examples: int
    outcomes: list[Outcome]
    sweep: list[dict[str, Any]]
    model: str | None
    fresh: list[dict[str, Any]] = field(default_factory=list)

    def chosen(self, objective: str) -> Outcome:
        """The outcome of the first seed."""
        return next(o for o in self.outcomes if o.objective == objective)

    def config(self, objective: str) -> PatchConfig:
        """The patch an objective chose on the first split."""
        o = self.chosen(objective)
        setting = ZeroTuningConfig(gamma=o.gamma, heads=o.heads or None, layers=self.search.layers)
        return PatchConfig([setting], self.model)

    def save(self, out: str | Path) -> None:
        """Write the full sweep to `out`, and a loadable patch per objective to a folder of its name."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        versions = {"hfpatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        write_json(out / SWEEP_FILE, {"versions": versions, **asdict(self)})
        for objective in dict.fromkeys(o.objective for o in self.outcomes):
            self.config(objective).save_pretrained(out / objective)


class Runs:
    """The model's answers to all questions under each setting, asked once."""

    def __init__(self, model: nn.Module, questions: Questions, search: Search, advance: Callable[[], None]) -> None:
        self.model, self.questions, self.search, self.advance = model, questions, search, advance
        self.done: dict[Setting, Answers] = {}
        self.steps = 0

    def step(self, upto: int | None = None) -> None:
        """Advance by one, or to so many."""
        for _ in range(1 if upto is None else upto - self.steps):
            self.steps += 1
            self.advance()

    def __call__(self, gamma: float = 1.0, heads: Sequence[int] = ()) -> Answers:
        key: Setting = (1.0, ()) if gamma == 1 or not heads else (gamma, tuple(sorted(heads)))
        if key not in self.done:
            if key[1]:
                config = ZeroTuningConfig(gamma=gamma, heads=list(key[1]), layers=self.search.layers)
                with patched(self.model, config):
                    self.done[key] = self.questions.ask(self.model)
            else:
                self.done[key] = self.questions.ask(self.model)
            self.step()
        return self.done[key]


def most_settings(search: Search, heads: int, searches: int, fresh: bool = False) -> int:
    """Settings that so many searches, one per objective and seed, try at most: the steps of a calibration."""
    grid = max(sum(g > 1 for g in search.gammas), sum(g < 1 for g in search.gammas))
    steps = 1 + 2 * heads + searches * (grid + search.random_draws)
    return steps + (len(search.gammas) + 2 * (2 + searches + search.random_draws) if fresh else 0)


def calibrate_zerotuning(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    search: Search | None = None,
    *,
    fresh: Sequence[Example] = (),
    batch: int = 32,
    advance: Callable[[], None] | None = None,
) -> Calibration:
    """Profile every query head, keep the best of the dominant kind, and search one factor for them.

    ZeroTuning, arXiv 2505.11739. Supervised by accuracy where the examples carry answers, and unsupervised by mean
    next-token entropy. Each seed splits the examples into a part to search on and a held-out part to report on; the
    paper has one seed, and its unsupervised mode looks at the test inputs. Ties in accuracy, which the paper leaves
    open, go by the right label's log-probability. With `fresh` examples the search sees all others at once, and the
    report is about the fresh ones. Raises ConfigError.
    """
    s = search or Search()
    questions = Questions(tokenizer, examples, batch, share=True)
    questions.check(model)
    heads = query_heads(model)
    if heads is None:
        raise ConfigError("The model's config does not tell its number of query heads.")
    if len(questions) < 8:
        raise ConfigError(f"{len(questions)} examples are too few to search and to test on; give at least 8.")
    runs = Runs(model, questions, s, advance or (lambda: None))
    asked = [Runs(model, q, s, runs.step) for q in _fresh(model, tokenizer, questions, fresh, batch)]
    outcomes = []
    for objective in OBJECTIVES if questions.supervised else OBJECTIVES[1:]:
        for seed in s.seeds[: 1 if fresh else None]:
            rows = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
            kept = max(4, round(len(questions) * s.held_out))
            outcome = _search(runs, objective, seed, rows if fresh else rows[kept:], heads)
            outcome.held_out = {} if fresh else held_out(runs, outcome, rows[:kept], rows[kept:], heads)
            outcomes.append(outcome)
            runs.step(upto=most_settings(s, heads, len(outcomes)))
    told = on_fresh(runs, asked[0], asked[1] if len(asked) > 1 else None, outcomes, heads) if asked else []
    if asked:
        runs.step(upto=most_settings(s, heads, len(outcomes), fresh=True))
    everything = torch.arange(len(questions))
    sweep = [{"gamma": g, "heads": list(h), **measures(questions, a, everything)} for (g, h), a in runs.done.items()]
    name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    return Calibration(s, len(questions), outcomes, sweep, name, told)


def _fresh(
    model: nn.Module, tokenizer: Any, known: Questions, fresh: Sequence[Example], batch: int
) -> list[Questions]:
    """The fresh examples' questions and, if all have blanks, those. Raises ConfigError."""
    if not fresh:
        return []
    questions = [Questions(tokenizer, fresh, batch, share=True)]
    if all(e.blanks for e in fresh):
        blanks = {b: Example(b, tuple(known.names)) for e in fresh for b in e.blanks}
        questions.append(Questions(tokenizer, list(blanks.values()), batch, share=True))
    if not known.supervised or not questions[0].supervised:
        raise ConfigError("Every example needs an 'answer' that is one of its 'labels', where --fresh asks for more.")
    if any(q.names != known.names for q in questions):
        raise ConfigError("The fresh examples have other labels than those to search on; raise --examples.")
    for q in questions:
        q.check(model)
    return questions


def _score(q: Questions, a: Answers, rows: Tensor, objective: str) -> tuple[float, ...]:
    found = measures(q, a, rows)
    return (found["accuracy"], found["log_likelihood"]) if objective == "accuracy" else (-found["entropy"],)


def _search(runs: Runs, objective: str, seed: int, rows: Tensor, heads: int) -> Outcome:
    s, q = runs.search, runs.questions

    def score(gamma: float = 1.0, some: Sequence[int] = ()) -> tuple[float, ...]:
        return _score(q, runs(gamma, some), rows, objective)

    base = score()
    probes = {"up": s.up, "down": s.down}
    gains = {
        kind: [tuple(x - b for x, b in zip(score(g, [h]), base, strict=True)) for h in range(heads)]
        for kind, g in probes.items()
    }
    profile = [{"head": h, "up": list(gains["up"][h]), "down": list(gains["down"][h])} for h in range(heads)]
    nothing = tuple(0.0 for _ in base)
    effective = {kind: [h for h in range(heads) if gains[kind][h] > nothing] for kind in probes}
    kind = max(probes, key=lambda k: (len(effective[k]), [sum(gains[k][h][0] for h in effective[k])]))
    if not effective[kind]:
        return Outcome(objective, seed, "none", [], 1.0, profile, [])
    ranked = sorted(effective[kind], key=lambda h: gains[kind][h], reverse=True)
    chosen = sorted(ranked[: math.ceil(s.top * len(ranked))])
    grid = [g for g in s.gammas if g == 1 or (g > 1) == (kind == "up")]
    scores = {g: score(g, chosen) for g in dict.fromkeys([1.0, *grid])}
    best = max(scores, key=lambda g: (scores[g], -abs(math.log(g))))
    tried = [{"gamma": g, **measures(q, runs(g, chosen), rows)} for g in scores]
    return Outcome(objective, seed, kind, chosen if best != 1 else [], best, profile, tried)


def factors(text: str) -> tuple[float, ...]:
    """Factors to try, 1 among them. Raises ConfigError."""
    try:
        found = sorted({1.0, *map(float, text.split(","))})
    except ValueError as error:
        raise ConfigError(f"--gammas {text!r:.100} is not numbers with commas between; write 0.5,2,4.") from error
    if not all(LEAST <= g <= MOST for g in found):
        raise ConfigError(f"--gammas {text!r:.100} must all be {LEAST} to {MOST:g}.")
    return tuple(found)


def zerotuning(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the sweep and one loadable patch per objective.")],
    data: Data = "embedded",
    split: Split = "train",
    prompt: Prompt = "{text}",
    answer: Answer = "label",
    names: Names = "",
    examples: Count = 400,
    fresh: Annotated[int, number("Further examples to report on; all others are searched.", 0)] = 0,
    shots: Shots = 6,
    renamed: Renamed = False,
    layers: Annotated[str | None, typer.Option(help="Decoder layers to tune; all by default.")] = None,
    gammas: Annotated[str | None, typer.Option(help="Factors to try, such as 0.5,2,4; twelve by default.")] = None,
    seeds: Annotated[int, number("Splits to repeat the search on.", 1, 1000)] = 3,
    batch: Batch = 32,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Find heads and factor of `zerotuning`, by accuracy and by entropy; prints held-out results and controls."""
    from hfpatch.evals.run.models import load_model

    from ..cli.console import console, progress, quieten

    quieten()
    tried = factors(gammas) if gammas else Search.gammas
    search = Search(seeds=tuple(range(seeds)), layers=layers, gammas=tried)
    with own_folder(out, (SWEEP_FILE,)):
        loaded = load_model(model, dtype, device)
        every = Source(data, split, prompt, answer, names, shots, renamed).load(examples + fresh)
        found, more = every[:examples], every[examples:]
        searches = len(OBJECTIVES if supervised(found) else OBJECTIVES[1:]) * (1 if more else len(search.seeds))
        steps = most_settings(search, query_heads(loaded.model) or 0, searches, bool(more))
        with progress("settings", steps) as advance:
            result = calibrate_zerotuning(
                loaded.model, loaded.tokenizer, found, search, fresh=more, batch=batch, advance=advance
            )
        result.save(out)
    for line in summary(result):
        console.print(line)
    console.print(f"written to {out}; use it with --patch {out}/accuracy")


def add_commands(app: typer.Typer) -> None:
    """Register `zerotuning` with the application behind `hfpatch calibrate`."""
    app.command()(zerotuning)
