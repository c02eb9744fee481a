"""`hfpatch calibrate flux`: routers trained, or layers ranked, on texts with known tasks."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..flux.examples import built_in_examples, read_examples
from ..flux.published import projection_difference, read_published
from ..flux.ranking import rank_layers
from ..flux.training import Recipe, Trainer
from ..methods.flux import FluxConfig
from ..patch_config import PatchConfig


def flux(
    model: Annotated[str, typer.Argument(help="Model folder, Hub id, or 'embedded'.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="Folder for the result; a patch config that can be loaded or pushed.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL with prompt, answer, kind; generated examples when left out.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="Take the routers of a downloaded checkpoint of the paper's code instead.")
    ] = None,
    router: Annotated[str, typer.Option(help="learned, error or entropy (the last two rank layers).")] = "learned",
    target_sparsity: Annotated[float, typer.Option(help="Share of layers to route sparse on retrieval.")] = 0.45,
    holistic_sparsity: Annotated[float, typer.Option(help="Share of layers to route sparse otherwise.")] = 1.0,
    sparse: Annotated[str, typer.Option(help="Method of the sparse branch.")] = "streaming",
    sparse_settings: Annotated[str, typer.Option(help="Its settings as JSON.")] = '{"sink": 4, "window": 128}',
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    batch: Annotated[int, typer.Option(help="Examples per step, over all processes.")] = 4,
    rate: Annotated[float, typer.Option(help="Learning rate of the routers.")] = 5e-4,
    multiplier_rate: Annotated[float, typer.Option(help="Learning rate of the constraint's multipliers.")] = 1e-3,
    examples: Annotated[int, typer.Option(help="Generated examples.")] = 400,
    checks: Annotated[int, typer.Option(help="Examples kept aside for the check at every save.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens per example.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of examples, weights and order.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:0; the accelerator if there is one.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew instead of continuing a run.")] = False,
) -> None:
    """Train Flux's routers for a model, or rank its layers; prints loss and sparsity by kind of task.

    Runs under `accelerate launch` too.
    """
    from ..cli_console import console, progress, quieten
    from ..evals.models import load_model
    from ..evals.shards import Shard

    quieten()
    shard = Shard.from_environment()
    loaded = load_model(model, dtype, device or shard.device)
    settings = json.loads(sparse_settings)
    if published is not None:
        config = FluxConfig(router="learned", sparse=sparse, sparse_settings=settings)
        PatchConfig([config], model, {f"0.{k}": t for k, t in read_published(published).items()}).save_pretrained(out)
        console.print("converted by name and shape only; this has not been tested on a real checkpoint")
        if change := projection_difference(published, loaded.model):
            console.print(f"its projections differ from those of MODEL by up to {change:.1%}: it is another model")
        return
    drawn = (
        list(read_examples(data, loaded.tokenizer, length))
        if data
        else built_in_examples(loaded.tokenizer, examples + checks, length, seed)
    )
    if router != "learned":
        config = FluxConfig(router="entropy", sparse=sparse, sparse_settings=settings, sparsity=target_sparsity)
        scores = rank_layers(loaded.model, [e.ids for e in drawn[:32]], config, by=router)
        PatchConfig([config], model, {"0.ranking": scores}).save_pretrained(out)
        console.print(f"scores by layer: {[round(float(s), 4) for s in scores]}")
    else:
        targets = {"retrieval": target_sparsity, "holistic": holistic_sparsity}
        recipe = Recipe(targets, steps=steps, batch=batch, rate=rate, multiplier_rate=multiplier_rate, seed=seed)
        config = FluxConfig(router="learned", sparse=sparse, sparse_settings=settings)
        keep = min(checks, len(drawn) // 2)
        trainer = Trainer(loaded.model, config, drawn[keep:], recipe, out, drawn[:keep])
        with progress("flux routers", steps) as advance:
            result = trainer.run(advance, resume=not fresh)
        if shard.rank:
            return
        result.save_pretrained(out)
        for check in trainer.checks:
            told = ", ".join(
                f"{k} {check[k]:.0%} sparse at loss {check[f'{k} loss']:.3f}" for k in targets if k in check
            )
            console.print(f"step {int(check['step'])}, kept aside: {told}")
    console.print(f"written to {out}; use it with --patch {out}")


def add_commands(app: typer.Typer) -> None:
    """Register `flux` with the application behind `hfpatch calibrate`."""
    app.command()(flux)
