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

from ..cli.options import Device, Dtype, Model, number
from ..config.patch_config import PatchConfig
from ..errors import ConfigError
from ..files.output import write_json
from ..methods.zerotuning import LEAST, MOST, ZeroTuningConfig
from ..runtime.model_facts import query_heads
from ..version import __version__
from .asked import EXAMPLES, Asked
from .classification import Answers, Example, Questions, Source, measures, supervised
from .options import Answer, Batch, Count, Data, Fresh, Names, Prompt, Renamed, Shots, Split
from .unfinished import calibration_folder, finish
from .zerotuning_report import BLANKS, UNSEEN, held_out, on_unseen, summary

SWEEP_FILE = "calibration.json"
OBJECTIVES = ("accuracy", "entropy")


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
    unseen: list[dict[str, Any]] = field(default_factory=list)

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
        finish(out)


def most_settings(search: Search, heads: int, searches: int, unseen: bool = False) -> int:
    """Settings that so many searches, one per objective and seed, try at most: the steps of a calibration."""
    grid = max(sum(g > 1 for g in search.gammas), sum(g < 1 for g in search.gammas))
    steps = 1 + 2 * heads + searches * (grid + search.random_draws)
    return steps + (len(search.gammas) + 2 * (2 + searches + search.random_draws) if unseen else 0)


def calibrate_zerotuning(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    search: Search | None = None,
    *,
    unseen: Sequence[Example] = (),
    batch: int = 32,
    out: str | Path | None = None,
    resume: bool = True,
    advance: Callable[[], None] | None = None,
) -> Calibration:
    """Profile every query head, keep the best of the dominant kind, and search one factor for them.

    ZeroTuning, arXiv 2505.11739. Supervised by accuracy where the examples carry answers, and unsupervised by mean
    next-token entropy. Each seed splits the examples into a part to search on and a held-out part to report on; the
    paper has one seed, and its unsupervised mode looks at the test inputs. Ties in accuracy, which the paper leaves
    open, go by the right label's log-probability. With `unseen` examples the search sees all others at once, and the
    report is about the unseen ones. In the folder `out` an interrupted search leaves the answers it has until `save`,
    and goes on from there when `resume`. Raises ConfigError.
    """
    s = search or Search()
    questions = Questions(tokenizer, examples, batch, share=True)
    questions.check(model)
    heads = query_heads(model)
    if heads is None:
        raise ConfigError("The model's config does not tell its number of query heads.")
    if len(questions) < 8:
        raise ConfigError(f"{len(questions)} examples are too few to search and to test on; give at least 8.")
    searches = _searches(s, questions.supervised, bool(unseen))
    run, most = {"search": asdict(s), "batch": batch}, most_settings(s, heads, len(searches), bool(unseen))
    every = {EXAMPLES: questions, **_unseen(model, tokenizer, questions, unseen, batch)}
    runs = Asked(model, every, s.layers, run, most, out, advance)
    if resume:
        runs.resume()
    with runs.kept.keeping(runs.part):
        outcomes = _outcomes(runs, s, searches, heads)
        told = on_unseen(runs, s, outcomes, heads) if unseen else []
        runs.step(upto=most)
    everything = torch.arange(len(questions))
    sweep = [
        {"gamma": g, "heads": list(h), **measures(questions, a, everything)} for (g, h), a in runs.settings().items()
    ]
    name = getattr(getattr(model, "config", None), "name_or_path", None) or None
    return Calibration(s, len(questions), outcomes, sweep, name, told)


def _searches(s: Search, answers: bool, unseen: bool) -> list[tuple[str, int]]:
    """Objective and seed of every search: unseen examples make a split, and so a second seed, needless."""
    seeds = s.seeds[:1] if unseen else s.seeds
    return [(objective, seed) for objective in (OBJECTIVES if answers else OBJECTIVES[1:]) for seed in seeds]


def _unseen(
    model: nn.Module, tokenizer: Any, known: Questions, unseen: Sequence[Example], batch: int
) -> dict[str, Questions]:
    """The unseen examples' questions and, if all have blanks, those. Raises ConfigError."""
    if not unseen:
        return {}
    questions = {UNSEEN: Questions(tokenizer, unseen, batch, share=True)}
    if all(e.blanks for e in unseen):
        blanks = {b: Example(b, tuple(known.names)) for e in unseen for b in e.blanks}
        questions[BLANKS] = Questions(tokenizer, list(blanks.values()), batch, share=True)
    if not known.supervised or not questions[UNSEEN].supervised:
        raise ConfigError("Every example needs an 'answer' that is one of its 'labels', where --unseen asks for more.")
    if any(q.names != known.names for q in questions.values()):
        raise ConfigError("The unseen examples have other labels than those to search on; raise --examples.")
    for q in questions.values():
        q.check(model)
    return questions


def _outcomes(runs: Asked, s: Search, searches: Sequence[tuple[str, int]], heads: int) -> list[Outcome]:
    outcomes, count, unseen = [], len(runs.questions[EXAMPLES]), UNSEEN in runs.questions
    for objective, seed in searches:
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = max(4, round(count * s.held_out))
        outcome = _search(runs, s, objective, seed, rows if unseen else rows[kept:], heads)
        outcome.held_out = {} if unseen else held_out(runs, s, outcome, rows[:kept], rows[kept:], heads)
        outcomes.append(outcome)
        runs.step(upto=most_settings(s, heads, len(outcomes)))
    return outcomes


def _score(q: Questions, a: Answers, rows: Tensor, objective: str) -> tuple[float, ...]:
    found = measures(q, a, rows)
    return (found["accuracy"], found["log_likelihood"]) if objective == "accuracy" else (-found["entropy"],)


def _search(runs: Asked, s: Search, objective: str, seed: int, rows: Tensor, heads: int) -> Outcome:
    q = runs.questions[EXAMPLES]

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
    unseen: Annotated[int, number("Further examples to report on; all others are searched.", 0)] = 0,
    shots: Shots = 6,
    renamed: Renamed = False,
    layers: Annotated[str | None, typer.Option(help="Decoder layers to tune; all by default.")] = None,
    gammas: Annotated[str | None, typer.Option(help="Factors to try, such as 0.5,2,4; twelve by default.")] = None,
    seeds: Annotated[int, number("Splits to repeat the search on.", 1, 1000)] = 3,
    batch: Batch = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Find heads and factor of `zerotuning`, by accuracy and by entropy; prints held-out results and controls."""
    from hfpatch.evals.run.models import load_model

    from ..cli.console import console, progress, quieten

    quieten()
    tried = factors(gammas) if gammas else Search.gammas
    search = Search(seeds=tuple(range(seeds)), layers=layers, gammas=tried)
    with calibration_folder(out, (SWEEP_FILE,)):
        loaded = load_model(model, dtype, device)
        every = Source(data, split, prompt, answer, names, shots, renamed).load(examples + unseen)
        found, more = every[:examples], every[examples:]
        searches = len(_searches(search, supervised(found), bool(more)))
        steps = most_settings(search, query_heads(loaded.model) or 0, searches, bool(more))
        with progress("settings", steps) as advance:
            result = calibrate_zerotuning(
                loaded.model, loaded.tokenizer, found, search, unseen=more, batch=batch, out=out, resume=not fresh,
                advance=advance,
            )  # fmt: skip
        result.save(out)
    for line in summary(result):
        console.print(line)
    console.print(f"written to {out}; use it with --patch {out}/accuracy")


def add_commands(app: typer.Typer) -> None:
    """Register `zerotuning` with the application behind `hfpatch calibrate`."""
    app.command()(zerotuning)
