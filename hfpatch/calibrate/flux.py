"""`hfpatch calibrate flux`: routers trained, or layers ranked, on texts with known tasks."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import ConfigError
from ..flux.ranking import rank_layers
from ..flux.training import Example, Recipe, Trainer
from ..methods.flux import FluxConfig
from ..patch_config import PatchConfig

RETRIEVAL = ("single", "multikey", "kvlist", "passkey")


def read_examples(path: Path, tokenizer: Any, limit: int) -> Iterator[Example]:
    """Examples of a JSONL file with `prompt`, `answer` and `kind` (retrieval or holistic). Raises ConfigError."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            prompt, answer, kind = entry["prompt"], entry["answer"], entry["kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: expected prompt, answer and kind ({error}).") from error
        yield _example(tokenizer, prompt, answer, kind, limit)


def _example(tokenizer: Any, prompt: str, answer: str, kind: str, limit: int) -> Example:
    head = list(tokenizer(prompt)["input_ids"])
    tail = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    ids = (head + tail)[-limit:]
    return Example(torch.tensor(ids), max(1, len(ids) - len(tail)), kind)


def built_in_examples(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[Example]:
    """Half retrieval (needles, key-value lists), half holistic (continuing prose), about `length` tokens each."""
    from ..evals.testbed import text

    found = []
    for n in range(count):
        rng = random.Random(f"flux-{seed}-{n}")
        stream = text.prose_sentences(rng) if n % 4 < 2 else text.grammar_sentences(rng)
        body: list[str] = []
        size = 0
        while size < length * 0.9:
            body.append(next(stream))
            size += len(tokenizer(" " + body[-1], add_special_tokens=False)["input_ids"])
        if n % 2:
            half = len(body) // 2
            found.append(_example(tokenizer, " ".join(body[:half]), " " + " ".join(body[half:]), "holistic", length))
            continue
        task = text.TASKS[rng.choice(RETRIEVAL)](rng)
        for fact in task.facts:
            body.insert(rng.randint(0, len(body)), fact)
        prompt, answer = rng.choice(task.turns)
        found.append(_example(tokenizer, " ".join(body) + "\n" + prompt, answer, "retrieval", length))
    return found


def flux(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id, or 'embedded'.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the result; a patch config that can be loaded or pushed.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL with prompt, answer, kind; generated examples when left out.")
    ] = None,
    router: Annotated[str, typer.Option(help="learned, error or entropy (the last two rank layers).")] = "learned",
    target_sparsity: Annotated[float, typer.Option(help="Share of layers to route sparse on retrieval.")] = 0.45,
    holistic_sparsity: Annotated[float, typer.Option(help="Share of layers to route sparse otherwise.")] = 1.0,
    sparse: Annotated[str, typer.Option(help="Method of the sparse branch.")] = "streaming",
    sparse_settings: Annotated[str, typer.Option(help="Its settings as JSON.")] = '{"sink": 4, "window": 128}',
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    rate: Annotated[float, typer.Option(help="Learning rate of the routers.")] = 5e-4,
    examples: Annotated[int, typer.Option(help="Generated examples.")] = 400,
    length: Annotated[int, typer.Option(help="Tokens per example.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of examples, weights and order.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0; the accelerator if there is one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of continuing a run.")] = False,
) -> None:
    """Train Flux's routers for a model, or rank its layers; prints the sparsity reached by kind of task."""
    from ..cli_console import console, progress, quieten
    from ..evals.models import load_model

    quieten()
    loaded = load_model(model, dtype, device)
    tokenizer = loaded.tokenizer
    drawn = (
        list(read_examples(data, tokenizer, length)) if data else built_in_examples(tokenizer, examples, length, seed)
    )
    settings = json.loads(sparse_settings)
    if router != "learned":
        config = FluxConfig(router="entropy", sparse=sparse, sparse_settings=settings, sparsity=target_sparsity)
        scores = rank_layers(loaded.model, [e.ids for e in drawn[:32]], config, by=router)
        PatchConfig([config], model, {"0.ranking": scores}).save_pretrained(out)
        console.print(f"scores by layer: {[round(float(s), 4) for s in scores]}")
    else:
        targets = {"retrieval": target_sparsity, "holistic": holistic_sparsity}
        config = FluxConfig(router="learned", sparse=sparse, sparse_settings=settings)
        trainer = Trainer(
            loaded.model, config, drawn, Recipe(targets, steps=steps, rate=rate, seed=seed), out
        )  # fmt: skip
        with progress("flux routers", steps) as advance:
            trainer.run(advance, resume=not fresh).save_pretrained(out)
        for kind in targets:
            last = [h[kind] for h in trainer.history[-50:] if kind in h]
            console.print(f"{kind}: {sum(last) / max(1, len(last)):.0%} of layers sparse over the last steps")
    console.print(f"written to {out}; use it with --patch {out}")


def add_commands(app: typer.Typer) -> None:
    """Register `flux` with the application behind `hfpatch calibrate`."""
    app.command()(flux)
