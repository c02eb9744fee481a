"""Finds the heads for `act` on a classification task: each is tried alone, those that help are kept."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn

from ..api import patched, plan_patch
from ..cli.options import LAST_SEED, Device, Dtype, Model, number
from ..config.patch_config import CONFIG_FILE, PatchConfig
from ..errors import ConfigError
from ..files.output import write_json
from ..methods.act import ACTConfig
from ..runtime.model_facts import query_heads
from ..version import __version__
from .classification import Answers, Example, Questions, Source, measures
from .intervals import paired, wilson
from .options import Answer, Batch, Count, Data, Fresh, Names, Prompt, Renamed, Shots, Split
from .unfinished import Unfinished, calibration_folder, finish, model_mark

SWEEP_FILE = "calibration.json"
RULES = ("accuracy", "likelihood")


@dataclass
class HeadSearch:
    """What every head did alone on the searched half, which were kept, and the held-out measures of all kept."""

    rule: str
    examples: int
    base: dict[str, Any]
    heads: list[dict[str, Any]]
    kept: list[list[int]]
    held_out: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None

    def config(self) -> PatchConfig:
        """The patch with the heads that were kept; with none it changes nothing."""
        return PatchConfig([ACTConfig(**self.settings, heads=self.kept)], self.model)

    def save(self, out: str | Path) -> None:
        """Write every head's figures and the loadable patch to the folder `out`."""
        out = Path(out)
        self.config().save_pretrained(out)
        versions = {"hfpatch": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        write_json(out / SWEEP_FILE, {"versions": versions, **asdict(self)})
        finish(out)


def calibrate_act(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    config: ACTConfig | None = None,
    *,
    rule: str = "accuracy",
    seed: int = 0,
    batch: int = 32,
    out: str | Path | None = None,
    resume: bool = True,
    advance: Callable[[], None] | None = None,
) -> HeadSearch:
    """Try `act` on one head at a time and keep those that raise `rule` on half of the examples.

    ACT, arXiv 2406.15765, keeps heads that raise accuracy; rule "likelihood" takes the right label's mean
    log-probability, which still moves where accuracy stands still. The other half is held out, as the paper does not
    say; random heads are the control. In the folder `out` an interrupted search leaves what it has done until `save`,
    and goes on from there when `resume`. Raises ConfigError.
    """
    s = config or ACTConfig()
    if rule not in RULES:
        raise ConfigError(f"rule {rule!r} is not one of {', '.join(RULES)}.")
    if s.heads is not None:
        raise ConfigError("act: heads is what the calibration looks for; leave it out.")
    questions, count = _questions(model, tokenizer, examples, batch), query_heads(model)
    if count is None:
        raise ConfigError("The model's config does not tell its number of query heads.")
    settings = {k: getattr(s, k) for k in ("beta", "threshold", "layers", "executor")}
    step = advance or (lambda: None)

    def ask(heads: list[list[int]]) -> Answers:
        if heads:
            with patched(model, ACTConfig(**settings, heads=heads)):
                return questions.ask(model)
        return questions.ask(model)

    layers = [layer.index for layer, what in plan_patch(model, [s]) if what == "act"]
    rows = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed))
    searched, held = rows[len(rows) // 2 :], rows[: len(rows) // 2]
    every = [[n, h] for n in layers for h in range(count)]
    run = {"calibration": "act", "settings": settings, "seed": seed, "batch": batch, "layers": layers}
    marks = {"model": model_mark(model), "examples": questions.mark()}
    state = Unfinished(out, {**run, **marks}, "heads", len(every))
    tried = _tried(state, every) if resume else []
    for _ in tried:
        step()
    with state.keeping(lambda: ({"heads": tried}, {})):
        before = ask([])
        base = measures(questions, before, searched)
        step()
        for n, h in every[len(tried) :]:
            own = measures(questions, ask([[n, h]]), searched)
            with state.step():
                tried.append({"layer": n, "head": h, **own})
            step()
        key = "accuracy" if rule == "accuracy" else "log_likelihood"
        kept = [pair for pair, t in zip(every, tried, strict=True) if t[key] > base[key]]
        name = getattr(getattr(model, "config", None), "name_or_path", None) or None
        found = HeadSearch(rule, len(questions), base, tried, kept, settings=settings, model=name)
        drawn = sorted(random.Random(seed).sample(every, len(kept)))
        after = {}
        for which, heads in {"after": kept, "random_heads": drawn, "all_heads": every}.items():
            after[which] = ask(heads) if heads else before
            step()
    found.held_out = _held_out(questions, held, before, after)
    return found


def _questions(model: nn.Module, tokenizer: Any, examples: Sequence[Example], batch: int) -> Questions:
    """The examples, supervised and enough of them. Raises ConfigError."""
    questions = Questions(tokenizer, examples, batch)
    questions.check(model)
    if not questions.supervised:
        raise ConfigError("Every example needs an 'answer' that is one of its 'labels'.")
    if len(questions) < 8:
        raise ConfigError(f"{len(questions)} examples are too few to search and to test on; give at least 8.")
    return questions


def _tried(state: Unfinished, every: Sequence[list[int]]) -> list[dict[str, Any]]:
    """What an interrupted search found about the first of `every` head. Raises ConfigError."""
    part = state.load()
    if part is None:
        return []
    with state.fitting():
        tried = part[0]["heads"]
        if [[t["layer"], t["head"]] for t in tried] != list(every[: state.done]):
            raise ValueError("other heads")
        for t in tried:
            float(t["accuracy"]), float(t["log_likelihood"])
    return list(tried)


def _held_out(q: Questions, rows: Tensor, before: Answers, after: dict[str, Answers]) -> dict[str, Any]:
    out: dict[str, Any] = {"n": len(rows)}
    for name, a in {"before": before, **after}.items():
        out[name] = {**measures(q, a, rows), "interval": wilson(q.right_now(a)[rows])}
        out[name]["accuracy_change"] = paired(q.right_now(a)[rows], q.right_now(before)[rows])
    return out


def summary(found: HeadSearch) -> list[str]:
    """Three lines for people."""
    b, a, r, every = (found.held_out[k] for k in ("before", "after", "random_heads", "all_heads"))
    mean, low, high = a["accuracy_change"]
    return [
        f"{len(found.kept)} of {len(found.heads)} heads raise {found.rule} when calibrated alone: {found.kept}",
        f"held-out accuracy {b['accuracy']:.3f} -> {a['accuracy']:.3f} ({mean:+.3f}, 95 % {low:+.3f} to {high:+.3f}), "
        f"invalid answers {b['invalid']:.3f} -> {a['invalid']:.3f}, the right label's log-probability "
        f"{b['log_likelihood']:.3f} -> {a['log_likelihood']:.3f}",
        f"as many heads at random: accuracy {r['accuracy']:.3f}, log-probability {r['log_likelihood']:.3f}; "
        f"all heads: accuracy {every['accuracy']:.3f}",
    ]


def act(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the loadable patch and every head's figures.")],
    data: Data = "embedded",
    split: Split = "train",
    prompt: Prompt = "{text}",
    answer: Answer = "label",
    names: Names = "",
    examples: Count = 200,
    shots: Shots = 6,
    renamed: Renamed = False,
    layers: Annotated[str | None, typer.Option(help="Decoder layers to try; the paper leaves out 2--2.")] = None,
    beta: Annotated[float, number("What a sink keeps of its attention.", 0, 1)] = 0.4,
    rule: Annotated[str, typer.Option(help="What a head has to raise: accuracy or likelihood.")] = "accuracy",
    seed: Annotated[int, number("Seed of the split and of the random heads.", 0, LAST_SEED)] = 0,
    batch: Batch = 32,
    dtype: Dtype = "auto",
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Find the heads of `act`, one forward pass over the examples per head; prints held-out results and controls."""
    from hfpatch.evals.run.models import load_model

    from ..cli.console import console, progress, quieten

    quieten()
    config = ACTConfig(beta=beta, layers=layers)
    with calibration_folder(out, (CONFIG_FILE, SWEEP_FILE)):
        loaded = load_model(model, dtype, device)
        found = Source(data, split, prompt, answer, names, shots, renamed).load(examples)
        patched_layers = sum(what == "act" for _, what in plan_patch(loaded.model, [config]))
        with progress("heads", patched_layers * (query_heads(loaded.model) or 0) + 4) as step:
            result = calibrate_act(
                loaded.model, loaded.tokenizer, found, config, rule=rule, seed=seed, batch=batch, out=out,
                resume=not fresh, advance=step,
            )  # fmt: skip
        result.save(out)
    for line in summary(result):
        console.print(line)
    console.print(f"written to {out}; use it with --patch {out}")


def add_commands(app: typer.Typer) -> None:
    """Register `act` with the application behind `hfpatch calibrate`."""
    app.command()(act)
