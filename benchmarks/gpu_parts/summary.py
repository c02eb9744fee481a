"""gpu.json and gpu.md: every row, what is missing and why, and the bars of the project on Hopper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_parts.plan import FAILED, MISSING, OK, PARTS, SKIPPED, WRONG, Row

if TYPE_CHECKING:
    from gpu_parts.parent import Run

Found = tuple[float, str] | None
EIGHTH = 0.14  # densities up to this count as an eighth


def _best(rows: list[Row], key: str, least: bool = False) -> Found:
    rows = [r for r in rows if r.get(key) is not None]
    if not rows:
        return None
    row = (min if least else max)(rows, key=lambda r: r[key])
    return row[key], f"{row['case']} on {row['card']}"


def _dense(rows: list[Row]) -> Found:
    return _best([r for r in _of(rows, 3, "128k") if r.get("backend") and r["shape"] == "prefill causal"], "tflops")


def _prefill(rows: list[Row]) -> Found:
    right = [r for r in _of(rows, 4, "128k") if r.get("phase") == "prefill" and r["density"] <= EIGHTH]
    return _best(right, "ratio")


def _decode(rows: list[Row]) -> Found:
    mine = [r for r in _of(rows, 3, "128k") if r.get("shape") == "decode blocks" and r["batch"] == 1]
    return _best([r for r in mine if "executor" in r], "ratio")


def _tpot(rows: list[Row]) -> Found:
    patched = [r for r in _of(rows, 5, "8k") if r.get("patch") != "unpatched"]
    return _best(patched, "tpot_ratio", least=True)


def _ttft(rows: list[Row]) -> Found:
    return _best([r for r in _of(rows, 5, "128k") if r.get("patch") != "unpatched"], "ttft_ratio")


BARS: list[tuple[str, float, str, Callable[[list[Row]], Found]]] = [
    ("dense prefill attention at 128k, the fastest backend", 500, "TFLOP/s", _dense),
    ("prefill attention at 1/8 density, 128k, choosing included, the fastest method", 2.2, "x dense", _prefill),
    ("decode attention at 128k, 4k keys kept, batch 1, the fastest executor", 4.0, "x dense", _decode),
    ("TPOT at 8k, the slowest patch (unpatched / patched; 3 % slower is 0.97)", 1 / 1.03, "x unpatched", _tpot),
    ("TTFT of an 8B shape at 128k, the fastest patch", 2.2, "x unpatched", _ttft),
]


def _of(rows: list[Row], part: int, length: str) -> list[Row]:
    return [r for r in rows if r["part"] == part and r["status"] == OK and r.get("length") == length]


def bars(rows: list[Row], dry: bool) -> list[Row]:
    """Each bar with what was measured: pass, not, or not measured; a dry run measures nothing."""
    found = []
    for name, least, unit, measure in BARS:
        value = measure(rows)
        state = "not measured" if value is None else "dry run" if dry else "pass" if value[0] >= least else "not"
        found.append({"bar": name, "least": round(least, 3), "unit": unit, "state": state})
        if value is not None:
            found[-1] |= {"value": value[0], "where": value[1]}
    return found


def bars_text(rows: list[Row], dry: bool) -> str:
    """The bars as a table."""
    out = ["| bar | at least | measured | |", "|---|---|---|---|"]
    for b in bars(rows, dry):
        value = f"{b['value']:.3g} {b['unit']} ({b['where']})" if "value" in b else ""
        out.append(f"| {b['bar']} | {b['least']} {b['unit']} | {value} | {b['state']} |")
    return "\n".join(out)


def write(run: "Run", folder: Path) -> None:
    """Write both files; what is there already is replaced whole."""
    dry = run.options["dry"]
    about = {"budget_s": run.budget, "took_s": round(run.budget - run.left(), 1), "dry": dry, "card": run.card}
    data = {**about, "bars": bars(run.rows, dry), "parts": run.parts, "rows": run.rows}
    for name, text in (("gpu.json", json.dumps(data, indent=1)), ("gpu.md", page(run.rows, run.parts, about))):
        temporary = folder / f"{name}.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def page(rows: list[Row], parts: dict[int, Row], about: Row) -> str:
    """gpu.md."""
    out = ["# hfpatch on a GPU\n"]
    if about["dry"]:
        out.append("**A dry run on a CPU at tiny sizes. It shows that the script works; its figures mean nothing.**\n")
    out.append(
        f"{about['card']}; {about['took_s']:.0f} of {about['budget_s']:.0f} s. Every row: gpu.jsonl, gpu.json.\n"
    )
    out += ["## Bars on Hopper\n", bars_text(rows, about["dry"]), "\n## Parts\n"]
    out += ["| part | limit, s | took, s | ok | wrong | failed | skipped | not run |", "|---" * 8 + "|"]
    for n, part in PARTS.items():
        counts = [sum(r["part"] == n and r["status"] == s for r in rows) for s in (OK, WRONG, FAILED, SKIPPED)]
        if n in parts:
            p = parts[n]
            cells = [f"{p['limit_s']:.0f}", f"{p['took_s']:.0f}", *map(str, counts), str(len(p["missing"]))]
        else:
            cells = ["", "", *map(str, counts), "the rest" if any(counts) else "all"]
        out.append(f"| {n} {part.about} | {' | '.join(cells)} |")
    out += _troubles(rows)
    for n in PARTS:
        mine = [r for r in rows if r["part"] == n]
        if any(r["status"] == OK for r in mine):
            out += [f"\n## Part {n}: {PARTS[n].about}\n", *TABLES[n](mine)]
    return "\n".join(out) + "\n"


def _troubles(rows: list[Row]) -> list[str]:
    out = []
    for status, title in ((WRONG, "Wrong, and so without a time"), (FAILED, "Failed"), (MISSING, "Not run")):
        found = [r for r in rows if r["status"] == status]
        if found:
            out += [f"\n## {title}\n", *(f"- part {r['part']}, {r['case']}: {r['why']}" for r in found)]
            out += [f"  - {name}" for r in found for name in r.get("missing", [])[:40]]
    return out


def _table(columns: dict[str, str]) -> Callable[[list[Row]], list[str]]:
    """A table of the rows that are ok: heading and key of each column; a reason where a row was skipped."""

    def make(rows: list[Row]) -> list[str]:
        keys = list(columns.values())
        out = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for r in rows:
            if r["status"] == OK:
                out.append("| " + " | ".join(_cell(r.get(k)) for k in keys) + " |")
        return [*out, *_skipped(rows)]

    return make


def _skipped(rows: list[Row]) -> list[str]:
    """Why there is no row, and of how many cases."""
    found: dict[str, list[str]] = {}
    for r in rows:
        if r["status"] == SKIPPED:
            found.setdefault(f"{r['backend']}: {r['why']}" if "backend" in r else r["why"], []).append(r["case"])
    out = [f"- {why} ({len(cases)} cases, {cases[0]} the first)" for why, cases in found.items()]
    return ["", "Skipped:\n", *out] if out else []


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return "" if value is None else str(value)


def _card(rows: list[Row]) -> list[str]:
    compiled = [r for r in rows if r["status"] == OK and r["case"].startswith("compile ")]
    own = [r for r in rows if r["status"] == OK and r not in compiled]
    hidden = {"part", "case", "status", "at_s"}
    out = [f"- {r['case']}: " + ", ".join(f"{k} {_cell(v)}" for k, v in r.items() if k not in hidden) for r in own]
    return [*out, f"- compiled: {len(compiled)} variants"]


def _right(rows: list[Row]) -> list[str]:
    """Executor by executor: problems that are right, and the largest errors among them."""
    out = ["| executor | right | of | largest error / allowed |", "|---" * 4 + "|"]
    judged = [r for r in rows if "executor" in r and r["status"] != SKIPPED]
    for name in dict.fromkeys(r["executor"] for r in judged):
        mine = [r for r in judged if r["executor"] == name]
        right = [r for r in mine if r["status"] == OK]
        worst = max((max(r["error"], r["error_lse"]) / r["allowed"] for r in right), default=0.0)
        out.append(f"| {name} | {len(right)} | {len(mine)} | {worst:.2g} |")
    tests = [r for r in rows if "passed" in r]
    return [*out, "", *(f"- {r['case']}: {r['passed']} passed, {r['skipped']} skipped, {r['status']}" for r in tests)]


TABLES: dict[int, Callable[[list[Row]], list[str]]] = {
    0: _card,
    1: _right,
    2: _table({"case": "case", "prefill": "prefill", "chunk": "chunk", "first step": "first step",
               "later steps": "later steps", "counted on a CPU": "expected",
               "more than that": "more", "error": "error"}),
    3: _table({"case": "case", "backend": "backend", "ms": "ms", "low": "low", "high": "high", "TFLOP/s": "tflops",
               "density": "density", "dense": "dense", "dense ms": "dense_ms", "ratio": "ratio",
               "eager ms": "eager_ms", "error": "error", "card": "card"}),
    4: _table({"case": "case", "select ms": "select_ms", "attend ms": "attend_ms", "report ms": "report_ms",
               "dense ms": "dense_ms", "ratio": "ratio", "density": "density", "peak MiB": "peak_mib",
               "error": "error", "card": "card"}),
    5: _table({"case": "case", "TTFT ms": "ttft_ms", "ratio": "ttft_ratio", "TPOT ms": "tpot_ms",
               "ratio ": "tpot_ratio", "peak MiB": "peak_mib", "error": "error", "card": "card"}),
    6: _table({"case": "case", "ms": "ms", "own ms": "own_ms", "ratio": "ratio", "error": "error", "card": "card"}),
}  # fmt: skip
