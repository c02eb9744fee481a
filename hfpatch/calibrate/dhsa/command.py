"""`hfpatch calibrate dhsa`."""

from pathlib import Path
from typing import Annotated

import typer

from ...cli.options import LAST_SEED, LONGEST, Device, Dtype, Model, number
from ...config.patch_config import CONFIG_FILE, TENSOR_FILE
from ..options import Fresh
from ..unfinished import calibration_folder
from .training import Recipe, calibrate_dhsa, haystack_texts, training_steps


def dhsa(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the predictor; a patch config that can be loaded or pushed.")],
    text: Annotated[
        str, typer.Option(help="Text to learn from: grammar, prose, or the path of a text file.")
    ] = "prose",
    labels: Annotated[
        str, typer.Option(help="sentences (and lines), or mass: the paper's, from the model's own attention.")
    ] = "sentences",
    texts: Annotated[int, number("Texts to draw; a tenth is kept aside for validation.", 2)] = 200,
    length: Annotated[int, number("Tokens per text.", 32, LONGEST)] = 2048,
    epochs: Annotated[int, number("Passes over the texts.", 1)] = 2,
    rate: Annotated[float, number("Learning rate.", 0, 1)] = 1e-3,
    width: Annotated[int, number("Channels the keys are projected to; 0 for none, as in the paper.", 0)] = 64,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Annotated[int, number("Seed of texts, weights and order.", 0, LAST_SEED)] = 42,
    force: Annotated[bool, typer.Option("--force", help="Save it even if it learned nothing.")] = False,
    fresh: Fresh = False,
) -> None:
    """Train the boundary predictor of `dhsa` for a model; prints its F1 on texts kept aside."""
    from hfpatch.evals.run.models import check_length, load_model

    from ...cli.console import console, progress, quieten

    quieten()
    recipe = Recipe(labels=labels, length=length, epochs=epochs, rate=rate, width=width or None, seed=seed)
    with calibration_folder(out, (CONFIG_FILE, TENSOR_FILE)):
        loaded = load_model(model, dtype, device)
        check_length(loaded, length)
        drawn = haystack_texts(text, texts, length, loaded.tokenizer, seed)
        steps = training_steps(loaded.tokenizer, drawn, recipe)
        with progress("boundary predictor", steps) as advance:
            quality = calibrate_dhsa(
                loaded.model, loaded.tokenizer, drawn, out, recipe, resume=not fresh, force=force, advance=advance
            )
    console.print(f"validation: {quality}")
    console.print(f"written to {out}; use it with --patch {out} or --patch dhsa:boundaries=predictor,predictor={out}")


def add_commands(app: typer.Typer) -> None:
    """Register `dhsa` with the application behind `hfpatch calibrate`."""
    app.command()(dhsa)
