"""Commands that run the model: inspect, niah, bench, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..files.output import writable
from ..text.needles import STYLES
from .console import console, quieten
from .options import (
    LONGEST,
    MANY,
    Device,
    Dtype,
    Lengths,
    Model,
    Out,
    PatchArgs,
    Patches,
    Seed,
    Settings,
    number,
    numbers,
    one_number,
)
from .run import execute_and_show

if TYPE_CHECKING:
    from hfpatch.evals.run.variants import Variant


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    for command in (inspect, niah, bench, demo):
        app.command()(command)


def _variants(patch: list[str] | None, pairs: list[str] | None, patch_args: str | None) -> "list[Variant]":
    from hfpatch.evals.run.variants import parse_settings, parse_variants

    return parse_variants(patch or [], parse_settings(pairs or [], patch_args))


def inspect(
    model: Model,
    patch: Patches = None,
    set: Settings = None,
    patch_args: PatchArgs = None,
    layer: Annotated[int | None, number("Decoder layer; the first patched one by default.", 0, MANY)] = None,
    head: Annotated[int, number("Query head (or key-value group) to draw, from 0.", 0, MANY)] = 0,
    length: Annotated[str, typer.Option(help="Tokens of the prompt.")] = "2k",
    text: Annotated[Path | None, typer.Option(help="A text file instead of the shipped prose.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    out: Out = Path("out/inspect"),
) -> None:
    """Draw the keys one layer lets every query see, and the chunks of dhsa, as a PNG."""
    quieten()
    from hfpatch.evals.run.models import load_model

    from .check import show_layer

    size = one_number(length, "length", low=16)
    variants = _variants(patch, set, patch_args)[1:]
    if len(variants) != 1:
        raise ConfigError("Name one patch to look at: --patch dhsa.")
    with writable(out):
        show_layer(load_model(model, dtype, device), variants[0], layer, head, size, text, out)


def niah(
    model: Model,
    patch: Patches = None,
    set: Settings = None,
    patch_args: PatchArgs = None,
    lengths: Lengths = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="Needle depths in percent of the haystack.")] = "0,25,50,75,100",
    samples: Annotated[int, number("Samples per length and depth.", 1, MANY)] = 4,
    haystack: Annotated[str, typer.Option(help="grammar, prose, or the path of a text file.")] = "grammar",
    batch_size: Annotated[int, number("Prompts per batch; masks take memory by its length squared.", 1, MANY)] = 4,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="Prompts through the chat template; by default where there is one."),
    ] = None,
    needle: Annotated[
        str | None, typer.Option(help="grammar, words or cities; grammar for the embedded model, else words.")
    ] = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="All depths in one haystack, prefilled once: far less to compute."),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    out: Out = Path("out/niah"),
) -> None:
    """Needle in a haystack: lengths x depths, patched against dense; table, heat map, every sample."""
    from hfpatch.evals.jobs.niah import NiahJob
    from hfpatch.evals.run.runner import Run

    if needle is not None and needle not in STYLES:
        raise ConfigError(f"--needle {needle!r:.40} is not one of {', '.join(STYLES)}.")
    job = NiahJob(
        numbers(lengths, "lengths", low=32), numbers(depths, "depths", low=0, high=100), samples, haystack, batch_size,
        chat, needle, together=together,
    )  # fmt: skip
    execute_and_show(
        Run("niah", model, _variants(patch, set, patch_args), [job], dtype, device, seed), out, fresh=True
    )


def bench(
    model: Model,
    patch: Patches = None,
    set: Settings = None,
    patch_args: PatchArgs = None,
    lengths: Lengths = "1k,4k,16k",
    decode_tokens: Annotated[int, number("Tokens decoded after each prompt.", 1, LONGEST)] = 32,
    repeats: Annotated[int, number("Timed runs of each variant, interleaved.", 1, MANY)] = 4,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in child processes on a CPU.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    out: Out = Path("out/bench"),
) -> None:
    """Latency and memory against dense in one run, with the length from which a patch pays off."""
    from hfpatch.evals.jobs.latency import LatencyJob
    from hfpatch.evals.jobs.memory import MemoryJob
    from hfpatch.evals.run.runner import Run

    sizes = numbers(lengths, "lengths", low=16)
    latency = LatencyJob(sizes, decode_tokens, repeats)
    jobs = [latency, MemoryJob(sizes)] if memory else [latency]
    execute_and_show(
        Run("bench", model, _variants(patch, set, patch_args), jobs, dtype, device, seed), out, fresh=True
    )


def demo(out: Out = Path("out/demo"), model: Annotated[str, typer.Option(hidden=True)] = "embedded") -> None:
    """Dense against streaming on the embedded model, offline, in a few minutes."""
    from hfpatch.evals.demo import demo_run, meaning

    run = demo_run(model)
    console.print(run.about)
    results = execute_and_show(run, out, fresh=True, words=False)
    for sentence in meaning(results) if results else []:
        console.print(sentence)
