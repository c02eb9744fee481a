"""What a variant misses of dense attention: mass kept beside an oracle's, and the error of the output, by layer."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from hfpatch.core.audit_report import Estimate, Moments, Tally
from hfpatch.core.report import LayerLine
from hfpatch.text.prompt_ids import prompt_ids

from ..run.cells import Cell, CellResult, Data, Session, Work
from ..run.generation import generate_tokens
from ..run.models import check_length
from ..run.stats import tokens
from ..run.variants import DENSE, Variant
from ..tasks import PerplexityByPosition
from .base import COUNT, FIGURE, HAYSTACK, LENGTHS, NUMBER, POSITIVE, TEXT, WHOLE, Job, keys, setting
from .registry import register_job
from .view import (
    PLAIN,
    Answer,
    Aspect,
    Lines,
    Number,
    Panel,
    Row,
    Series,
    Table,
    TableCell,
    Unit,
    View,
    heading,
    lengths_of,
    names_of,
    new_lengths,
    of_variant,
)

PHASES = ("prefill", "decode")
NONE_OR_MORE = {"type": "integer", "minimum": 0, "maximum": 1000000}
BOUND = {"anyOf": [{"type": "null"}, FIGURE]}
ESTIMATE = keys(mean=FIGURE, low=BOUND, high=BOUND)
MASSES = {
    "mass": ESTIMATE, "error": ESTIMATE, "kept_in_tiles": {"anyOf": [{"type": "null"}, ESTIMATE]},
    "oracle_in_tiles": {"anyOf": [{"type": "null"}, ESTIMATE]}, "oracle": BOUND,
}  # fmt: skip
UNIT = Unit(lambda value: f"{value:.3f}", more_is_better=True)
MASS = Aspect(
    "mass kept", "Mass kept: the share of dense attention's weights on keys that the variant looks at.", UNIT.show,
    lambda own, dense, clear: f"keeps {own:.1%} of the attention", longest=True,
)  # fmt: skip
ORACLE = Aspect(
    "oracle", "Oracle: the mass that as many keys, chosen best in the same structure, would keep.", UNIT.show,
    lambda own, dense, clear: f"could keep {own:.1%} with the best choice of as many keys", longest=True,
)  # fmt: skip


@register_job
@dataclass(frozen=True)
class AuditJob(Job):
    """Settings of an audit: prompt lengths, samples, what is looked at in each call, and steps after the prompt."""

    kind = "audit"
    about = "Attention mass kept, beside the best choice of as many keys, and the error of attention's output."
    group = "measure"
    row = keys(
        variant=TEXT, length=POSITIVE, phase={"enum": PHASES}, density=NUMBER, sparse_layers=WHOLE, **MASSES,
        notes={"type": "array", "items": TEXT},
        layers={"type": "array", "minItems": 1, "items": keys(layer=WHOLE, **MASSES)},
    )  # fmt: skip

    lengths: Sequence[int] = setting(LENGTHS)
    samples: int = setting(COUNT, 2, "Per length.")
    rows_per_call: int = setting(COUNT, 16, "Queries of every sparse call that are worked out densely too.")
    tiles: int = setting(NONE_OR_MORE, 4, "Tiles of queries of every sparse call whose oracle is worked out.")
    new_tokens: int = setting(NONE_OR_MORE, 8, "Steps decoded after the prompt.")
    haystack: str = setting(HAYSTACK, "prose")
    label: str = "audit"

    def steps(self, cell: Cell, variants: Sequence[Variant]) -> int:
        """Samples."""
        return self.samples

    def work(self, cell: Cell, variants: Sequence[Variant]) -> Work | None:
        """Every sample once."""
        return Work(self.samples, self.new_tokens)

    def check(self, cell: Cell, session: Session) -> None:
        """The prompt and what is fed after it."""
        check_length(session.loaded, cell.length, self.new_tokens + 1)

    def run(self, cell: Cell, session: Session) -> CellResult:
        """Read every sample under the variant and go on from it, looking at some queries of every call."""
        loaded, variant = session.loaded, session.variant(cell.variant)
        phases = PHASES if self.new_tokens else PHASES[:1]
        every = range(loaded.model.config.get_text_config().num_hidden_layers)
        task = PerplexityByPosition()
        samples = task.samples(loaded.tokenizer, cell.length, self.samples, session.seed, haystack=self.haystack)
        with variant.applied(loaded.model) as patch:
            if patch is None:
                for _ in samples:
                    session.step()
                return CellResult({"phases": [phase_found(name, every, [], {}) for name in phases], "notes": []})
            with patch.audit(self.rows_per_call, tiles=self.tiles, seed=session.seed) as looked:
                for sample in samples:
                    ids = torch.tensor([prompt_ids(loaded.tokenizer, sample.prompt)], device=loaded.device)
                    generate_tokens(loaded, ids, self.new_tokens + 1)  # the first comes from the prompt
                    session.step()
            lines = patch.report().lines
        found = [phase_found(name, every, lines, looked.tallies) for name in phases]
        if looked.cropped or looked.in_graph:  # calls that could not be looked at kept an unknown share
            found = [p for p in found if p["sparse_layers"] or p["density"] == 1]
        return CellResult({"phases": found, "notes": looked.report().notes})

    def rows(self, done: Mapping[Cell, Data]) -> list[Data]:
        """One row per length, variant and phase."""
        return [
            {"variant": c.variant, "length": c.length, **phase, "notes": data["notes"]}
            for c, data in done.items()
            for phase in data["phases"]
        ]

    @classmethod
    def view(cls, entry: Data, decode_only: Collection[str] = ()) -> View:
        """Mass kept, the oracle's and the error, with the worst layer of each."""
        rows = sorted(entry["rows"], key=lambda r: r["length"])
        shown = _shown(rows)
        header = ["variant", "prompt", "phase", "mass kept", "oracle", "error", "worst layer"]
        return View(
            heading("What is missed", entry),
            "The share of dense attention's weights on the keys that a variant looks at, exact for a few queries of "
            "every call; the same for the best choice of as many keys in the same structure (its oracle); and how "
            "far attention's output is from dense's, relative to its size.",
            Table("in all layers, and in the worst one", header, [_line(r) for r in shown], new_lengths(shown)),
            _plot(rows), [n for r in rows for n in _numbers(r)], _notes(rows, decode_only),
            [a for r in rows if r["phase"] == _phase(r["variant"], decode_only) for a in _answers(r)],
        )  # fmt: skip


def phase_found(
    phase: str, every: Sequence[int], lines: Sequence[LayerLine], tallies: Mapping[tuple[int, str], Tally]
) -> Data:
    """What a patch with these lines of a report missed in one phase; without lines, what dense attention misses."""
    own = [x for x in lines if x.phase == phase and x.stats.calls]
    found = {layer: tally for (layer, name), tally in tallies.items() if name == phase}
    calls: dict[int, int] = {n: 0 for n in ([x.layer for x in own] or every)}
    for x in own:
        calls[x.layer] += x.stats.calls
    visible = sum(x.stats.visible for x in own)
    return {
        "phase": phase, "density": sum(int(x.stats.attended) for x in own) / visible if visible else 1.0,
        "sparse_layers": len(found), **masses(list(found.values()), sum(calls.values())),
        "layers": [{"layer": n, **masses([found[n]] if n in found else [], calls[n])} for n in sorted(calls)],
    }  # fmt: skip


def masses(tallies: Sequence[Tally], calls: int) -> Data:
    """Means over `calls` of which these are the sparse ones; the others keep all mass and have no error."""
    if not tallies:
        sure = Estimate(1.0, math.nan, math.nan, 0)
        nothing = {"kept_in_tiles": None, "oracle_in_tiles": None}
        return {"mass": sure.to_dict(), "error": replace(sure, mean=0.0).to_dict(), **nothing, "oracle": 1.0}
    share = min(1.0, sum(t.calls for t in tallies) / calls)
    mass, error, kept, best = (Moments() for _ in range(4))
    for t in tallies:
        for sums, part in ((mass, t.mass), (error, t.error), (kept, t.kept), (best, t.best)):
            sums.merge(part)
    looked = mass.estimate(1.0)
    told = {"mass": _diluted(looked, share, 1.0), "error": _diluted(error.estimate(), share, 0.0)}
    if not kept.count:
        return {**told, "kept_in_tiles": None, "oracle_in_tiles": None, "oracle": None}
    own, ideal = kept.estimate(1.0), best.estimate(1.0)
    oracle = min(1.0, looked.mean + ideal.mean - own.mean)
    tiles = {"kept_in_tiles": _diluted(own, share, 1.0), "oracle_in_tiles": _diluted(ideal, share, 1.0)}
    return {**told, **tiles, "oracle": 1.0 + share * (oracle - 1.0)}


def _diluted(estimate: Estimate, share: float, dense: float) -> Data:
    """The mean where the estimate holds for this share of the calls and the others are `dense`."""
    mean, low, high = (dense + share * (x - dense) for x in (estimate.mean, estimate.low, estimate.high))
    return Estimate(mean, low, high, estimate.count).to_dict()


def _phase(name: str, decode_only: Collection[str]) -> str:
    return "decode" if name in decode_only else "prefill"


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Rows in which something is sparse, and the prefill's of variants that have none."""
    sparse = {(r["variant"], r["length"]) for r in rows if r["sparse_layers"]}
    return [
        r for r in rows
        if r["sparse_layers"] or (r["phase"] == "prefill" and (r["variant"], r["length"]) not in sparse)
    ]  # fmt: skip


def _line(row: Row) -> list[str | TableCell]:
    return [
        row["variant"], TableCell(tokens(row["length"]), f"{row['density']:.0%}"), row["phase"],
        TableCell(f"{row['mass']['mean']:.3f}", _bounds(row["mass"])), _oracle(row),
        TableCell(f"{row['error']['mean']:.3f}", _bounds(row["error"])), _worst(row) if row["sparse_layers"] else "",
    ]  # fmt: skip


def _bounds(found: Row) -> str:
    low, high = found["low"], found["high"]
    return "" if low is None or high is None else f"[{low:.3f}-{high:.3f}]"


def _worst(row: Row) -> TableCell:
    """The layer that keeps the least mass, and the one with the largest error."""
    least = min(row["layers"], key=lambda x: x["mass"]["mean"])
    most = max(row["layers"], key=lambda x: x["error"]["mean"])
    error = f"error {most['layer']}: {most['error']['mean']:.3f} {_bounds(most['error'])}"
    return TableCell(f"{least['layer']}: {least['mass']['mean']:.3f}", f"{_bounds(least['mass'])} {error}".strip())


def _oracle(row: Row) -> str | TableCell:
    if row["oracle"] is None:
        return "-"
    own, best = row["kept_in_tiles"], row["oracle_in_tiles"]
    small = "" if own is None or best is None else f"{own['mean']:.3f} of {best['mean']:.3f}"
    return TableCell(f"{row['oracle']:.3f}", small)


def _numbers(row: Row) -> list[Number]:
    name, at = row["variant"], tokens(row["length"])
    found = [
        Number(f"{what} in {row['phase']}", name, at, e["mean"], unit, e["low"], e["high"])
        for what, e, unit in (("mass kept", row["mass"], UNIT), ("output error", row["error"], PLAIN))
    ]
    oracle = [] if row["oracle"] is None else [Number(f"oracle in {row['phase']}", name, at, row["oracle"], UNIT)]
    return [*found, *oracle]


def _answers(row: Row) -> list[Answer]:
    found = [Answer(MASS, row["variant"], float(row["mass"]["mean"]), row["length"])]
    if row["oracle"] is not None:
        found.append(Answer(ORACLE, row["variant"], float(row["oracle"]), row["length"]))
    return found


def _notes(rows: Sequence[Row], decode_only: Collection[str]) -> list[str]:
    """What the columns mean, and who had nothing to miss."""
    told = [
        "Means over the layers a patch acts in; a layer or call it leaves dense keeps 1. In brackets: 95 % intervals, "
        "as if the queries looked at were drawn from many of the kind. Beside the prompt: keys attended.",
        "Worst layer: the one that keeps least; beside it the one with the largest error.",
        "Oracle: mass kept, and what the best choice of as many keys keeps more in the tiles looked at; beside it, "
        "what patch and best choice keep in those. What the oracle loses, the structure loses.",
    ]
    waiting = [n for n in names_of(rows) if n in decode_only]
    if waiting:
        told.append(f"{', '.join(waiting)}: nothing to miss in the prefill, as the patch acts in decode steps alone.")
    whole = [n for n in names_of(rows) if n != DENSE and not any(r["sparse_layers"] for r in of_variant(rows, n))]
    if whole:
        told.append(f"{', '.join(whole)}: no call was sparse here, so nothing was missed.")
    return [*told, *dict.fromkeys(f"{r['variant']}: {note}." for r in rows for note in r["notes"])]


def _plot(rows: Sequence[Row]) -> Lines:
    """Mass kept by layer in the longest prompts, a panel per phase, oracles dashed."""
    longest = lengths_of(rows)[-1]
    panels = []
    for phase in PHASES:
        own = [r for r in _shown(rows) if r["length"] == longest and r["phase"] == phase]
        if own and (phase == "prefill" or any(r["sparse_layers"] for r in own)):
            lines = [line for r in own for line in _by_layer(r)]
            panels.append(Panel(lines, "attention mass kept", phase, styles=("patch", "oracle")))
    return Lines(panels, "layer", lengths=False, note=f", prompts of {tokens(longest)} tokens")


def _by_layer(row: Row) -> list[Series]:
    at = [x["layer"] for x in row["layers"]]
    own = Series(row["variant"], at, [x["mass"]["mean"] for x in row["layers"]])
    best = [x["oracle"] for x in row["layers"]]
    known = row["sparse_layers"] and None not in best
    return [own, Series(row["variant"], at, best, dashed=True)] if known else [own]
