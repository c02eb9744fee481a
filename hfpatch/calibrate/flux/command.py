"""`hfpatch calibrate flux`: routers trained, or layers ranked, on texts with known tasks."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ...cli.options import LAST_SEED, LONGEST, Device, Dtype, Model, number
from ...config.patch_config import CONFIG_FILE, TENSOR_FILE, PatchConfig
from ...errors import ConfigError
from ...files.json_text import load_json
from ...launch import launched
from ...methods.flux.method import FluxConfig
from ...methods.flux.published import projection_difference, read_published
from ..options import Fresh
from ..unfinished import calibration_folder, finish
from .examples import built_in_examples, read_examples
from .ranking import rank_layers
from .training import Recipe, Trainer

RANKED = 32  # texts
ROUTERS = ("learned", "error", "entropy")
Tell = Callable[[str], None]


def flux(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the result; a patch config that can be loaded or pushed.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL with prompt, answer, kind; generated examples when left out.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="Take the routers of a downloaded checkpoint of the paper's code instead.")
    ] = None,
    router: Annotated[str, typer.Option(help="learned, error or entropy (the last two rank layers).")] = "learned",
    target_sparsity: Annotated[float, number("Share of layers to route sparse on retrieval.", 0, 1)] = 0.45,
    holistic_sparsity: Annotated[float, number("Share of layers to route sparse otherwise.", 0, 1)] = 1.0,
    sparse: Annotated[str, typer.Option(help="Method of the sparse branch.")] = "streaming",
    sparse_settings: Annotated[str, typer.Option(help="Its settings as JSON.")] = '{"sink": 4, "window": 128}',
    steps: Annotated[int, number("Training steps.", 1)] = 300,
    batch: Annotated[int, number("Examples per step, over all processes.", 1)] = 4,
    rate: Annotated[float, number("Learning rate of the routers.", 0, 1)] = 5e-4,
    multiplier_rate: Annotated[float, number("Learning rate of the constraint's multipliers.", 0, 1)] = 1e-3,
    examples: Annotated[int, number("Generated examples.", 2)] = 400,
    checks: Annotated[int, number("Examples kept aside for the check at every save.", 0)] = 24,
    length: Annotated[int, number("Tokens per example.", 32, LONGEST)] = 1024,
    seed: Annotated[int, number("Seed of examples, weights and order.", 0, LAST_SEED)] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Train Flux's routers for a model, or rank its layers; prints loss and sparsity by kind of task.

    Runs under `accelerate launch` too.
    """
    from hfpatch.evals.run.models import check_length, load_model
    from hfpatch.evals.run.shards import Shard

    from ...cli.console import console, progress, quieten

    quieten()
    if router not in ROUTERS:
        raise ConfigError(f"--router {router!r} is not one of {', '.join(ROUTERS)}.")
    branch: dict[str, Any] = {"sparse": sparse, "sparse_settings": _settings(sparse_settings)}
    learned = FluxConfig(router="learned", **branch)
    targets = {"retrieval": target_sparsity, "holistic": holistic_sparsity}
    recipe = Recipe(targets, steps=steps, batch=batch, rate=rate, multiplier_rate=multiplier_rate, seed=seed)
    with _folder(out):
        loaded = load_model(model, dtype, device or Shard.from_environment().device)
        check_length(loaded, length)
        if published is not None:
            _convert(published, learned, model, loaded.model, out, console.print)
            return
        if data is None:
            drawn = built_in_examples(loaded.tokenizer, examples + checks, length, seed)
        else:
            drawn = list(read_examples(data, loaded.tokenizer, length))
        if not drawn:
            raise ConfigError(f"{data} holds no examples; every line needs prompt, answer and kind.")
        if router == "learned":
            keep = min(checks, len(drawn) // 2)
            trainer = Trainer(loaded.model, learned, drawn[keep:], recipe, out, drawn[:keep])
            with progress("flux routers", steps) as advance:
                result = trainer.run(advance, resume=not fresh)
            if not trainer.processes.first:
                return
            result.save_pretrained(out)
            _tell_checks(trainer.checks, targets, console.print)
        else:
            ranked = FluxConfig(router="entropy", sparsity=target_sparsity, **branch)
            texts = [e.ids for e in drawn[:RANKED]]
            with progress("texts", len(texts)) as advance:
                scores = rank_layers(
                    loaded.model, texts, ranked, router, out=out, resume=not fresh, advance=advance
                )  # fmt: skip
            PatchConfig([ranked], model, {"0.ranking": scores}).save_pretrained(out)
            console.print(f"scores by layer: {[round(float(s), 4) for s in scores]}")
        finish(out)
    console.print(f"written to {out}; use it with --patch {out}")


def _folder(out: Path) -> AbstractContextManager[None]:
    """The folder, of the one process of a launch that writes."""
    return nullcontext() if launched().rank else calibration_folder(out, (CONFIG_FILE, TENSOR_FILE))


def _settings(text: str) -> dict[str, Any]:
    try:
        found = load_json(text)
    except ValueError as error:
        raise ConfigError(f"--sparse-settings {text!r:.200} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError("--sparse-settings takes a JSON object such as '{\"window\": 128}'.")
    return found


def _convert(folder: Path, config: FluxConfig, name: str, model: Any, out: Path, tell: Tell) -> None:
    PatchConfig([config], name, {f"0.{k}": t for k, t in read_published(folder).items()}).save_pretrained(out)
    tell("converted by name and shape only; this has not been tested on a real checkpoint")
    if change := projection_difference(folder, model):
        tell(f"its projections differ from those of MODEL by up to {change:.1%}: it is another model")


def _tell_checks(checks: Sequence[dict[str, float]], kinds: Iterable[str], tell: Tell) -> None:
    for check in checks:
        told = ", ".join(f"{k} {check[k]:.0%} sparse at loss {check[f'{k} loss']:.3f}" for k in kinds if k in check)
        tell(f"step {int(check['step'])}, kept aside: {told}")


def add_commands(app: typer.Typer) -> None:
    """Register `flux` with the application behind `hfpatch calibrate`."""
    app.command()(flux)
