"""`hfpatch audit`: what patches miss of dense attention, layer by layer."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..files.output import writable, write_json
from .console import console, progress, quieten
from .options import (
    LONGEST,
    MANY,
    Device,
    Dtype,
    Model,
    Out,
    PatchArgs,
    Patches,
    Seed,
    Settings,
    number,
    one_number,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hfpatch.evals.run.models import Loaded
    from hfpatch.evals.run.variants import Variant

    from ..core.audit_report import AuditReport, Estimate
    from ..core.report import Report

RESULT, PICTURE = "audit.json", "audit.png"


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(audit)


def audit(
    model: Model,
    patch: Patches = None,
    set: Settings = None,
    patch_args: PatchArgs = None,
    length: Annotated[str, typer.Option(help="Tokens of the prompt; a text is cut to them.")] = "2k",
    text: Annotated[Path | None, typer.Option(help="A text file instead of the shipped prose.")] = None,
    rows: Annotated[int, number("Queries of every call that are worked out densely too.", 1, LONGEST)] = 16,
    tiles: Annotated[int, number("Tiles of queries of every call whose oracle is worked out.", 1, LONGEST)] = 4,
    oracle: Annotated[bool, typer.Option(help="Set the best choice of as many keys beside the patch's.")] = True,
    new_tokens: Annotated[int, number("Steps decoded after the prompt.", 0, MANY)] = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    seed: Seed = 0,
    out: Out = Path("out/audit"),
) -> None:
    """What patches miss: attention mass kept, beside an oracle's, and the error of the output, layer by layer."""
    quieten()
    from hfpatch.evals.run.models import check_length, load_model
    from hfpatch.evals.run.results import environment
    from hfpatch.evals.run.variants import parse_settings, parse_variants

    from ..draw import draw_masses
    from .check import prompt_ids

    size = one_number(length, "length", low=16)
    variants = parse_variants(patch or [], parse_settings(set or [], patch_args))[1:]
    if not variants:
        raise ConfigError("Name one or several patches to audit: --patch dhsa.")
    with writable(out, (RESULT, PICTURE)):
        loaded = load_model(model, dtype, device)
        ids = prompt_ids(loaded, size, text)
        check_length(loaded, ids.shape[1], new_tokens + 1)
        looked = {"rows": rows, "tiles": tiles if oracle else 0, "seed": seed}
        with progress("audit", len(variants)) as step:
            found = {v.name: audited(loaded, v, ids, new_tokens, **looked, step=step) for v in variants}
        for name, (report, masses) in found.items():
            show_audit(name, report, masses)
        data = {
            "model": loaded.describe(), "environment": environment(loaded.device.type),
            "text": None if text is None else str(text), "tokens": ids.shape[1], "new_tokens": new_tokens, **looked,
            "patches": [
                {**v.to_dict(), "report": found[v.name][0].to_dict(), "audit": found[v.name][1].to_dict()}
                for v in variants
            ],
        }  # fmt: skip
        write_json(out / RESULT, data)
        files = [RESULT]
        if any(masses.lines for _, masses in found.values()):
            draw_masses({name: masses for name, (_, masses) in found.items()}, out / PICTURE)
            files.append(PICTURE)
        console.print(f"written to {out}: {', '.join(files)}")


def audited(
    loaded: "Loaded", variant: "Variant", ids: "Tensor", new_tokens: int, *, rows: int, tiles: int, seed: int,
    step: Any,
) -> "tuple[Report, AuditReport]":  # fmt: skip
    """What a patch did with `ids [1, L]` and the tokens decoded after them, and what it missed."""
    from hfpatch.evals.run.generation import generate_tokens

    with variant.applied(loaded.model) as patch:
        assert patch is not None
        with patch.audit(rows, tiles=tiles, seed=seed) as looked:
            generate_tokens(loaded, ids, new_tokens + 1)  # the first comes from the prompt
        step()
        return patch.report(), looked.report()


def show_audit(name: str, report: "Report", masses: "AuditReport") -> None:
    """Print a table by phase and layer, mass by distance, and what structure and choice lose."""
    lines = {(x.phase, x.layer): x for x in masses.lines}
    console.print(Text(name, style="bold"))
    if lines:
        density = {(x.phase, x.layer): x.stats.density for x in report.lines}
        table = Table("phase", "layer", "density", "mass kept", "in tiles", "oracle", "error", header_style="bold")
        for (phase, layer), x in sorted(lines.items(), key=lambda item: (item[0][0] == "decode", item[0])):
            masses_of = (str(x.mass), _mean(x.kept), _mean(x.best), _mean(x.error))
            table.add_row(phase, str(layer), f"{density[phase, layer]:.1%}", *masses_of)
        console.print(table)
    every = (x for x in report.lines if x.stats.calls and x.stats.density == 1)
    dense = Counter(x.phase for x in every if (x.phase, x.layer) not in lines)
    for phase, layers in dense.items():
        console.print(f"{phase}: {layers} layers attended to every key and miss none")
    for reason, calls in report.fallbacks().items():
        console.print(f"dense in {calls} calls: {reason}", style="dim")
    for distance, mass in masses.distances.items():
        console.print(f"{distance} tokens before the end: mass kept {mass}")
    for sentence in filter(None, [masses.split(), *masses.notes]):
        console.print(sentence)


def _mean(estimate: "Estimate | None") -> str:
    return "-" if estimate is None else f"{estimate.mean:.3f}"
