"""One self-contained HTML page per run."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..run.results import write_text
from ..run.stats import break_even_text, memory_text, share, spread_text, time_text, tokens
from ..run.variants import DENSE
from .page_template import STYLE, TABLE, TEMPLATE
from .summary import headline, sentences

Row = dict[str, Any]
HOW = {
    "niah": (
        "Needle in a haystack",
        "A sentence with a six-digit code is hidden at a given depth of a long text, and the model is asked for the "
        "code at the end of the same prompt. Each square is the share of codes it found: 0 % depth is the start of "
        "the text, 100 % the end, right before the question.",
    ),
    "reader": (
        "Facts beyond the window",
        "A fact is hidden at a given depth of a text that may be far longer than the model's window. A variant that "
        "reads in chunks gets the text as a stream and answers from the sentences it kept; the others get it as one "
        "prompt. Each square is the share of answers found.",
    ),
    "task": (
        "Task {label}",
        "Share of the expected answers that the generated text contains, by prompt length in tokens.",
    ),
    "lm-eval": ("lm-eval", "Scores as lm-eval's own harness computes them."),
    "perplexity": (
        "Perplexity by position",
        "How well prose is predicted early and late in the context; lower is better. A method that loses old context "
        "stays flat where dense keeps falling.",
    ),
    "latency": (
        "Latency",
        "Seconds until the first token (the prefill) and per further token (decoding), median over interleaved runs; "
        "bars show the spread. A ratio with ~ cannot be told from 1, as the spreads overlap. Compare numbers within "
        "this page only.",
    ),
    "memory": (
        "Peak memory",
        "The most memory in use above the loaded model while the prompt was read and while tokens were decoded; the "
        "key-value cache is part of it.",
    ),
}


def cell(text: str, tone: str = "") -> Row:
    """A table cell; tone is "good", "bad" or nothing."""
    return {"text": text, "tone": tone}


def write_page(results: Row, images: Mapping[str, Path], density: Path | None, path: Path) -> Path:
    """Write the page, images inside; returns its path."""
    jinja = Environment(autoescape=True, trim_blocks=True)
    inner = jinja.from_string(TABLE)
    environment = results["environment"]
    page = jinja.from_string(TEMPLATE).render(
        title=results["title"], about=results["about"], style=STYLE, facts=_facts(results),
        table=lambda t: Markup(inner.render(t=t)), headline=_headline(results), sentences=sentences(results),
        notes=results.get("notes", []), density_image=_data_uri(density) if density else None,
        sections=[_section(job, images[job["label"]]) for job in results["jobs"]], variants=_variants(results),
        raw=json.dumps({"environment": environment, "arguments": results["arguments"]}, indent=1, ensure_ascii=False),
    )  # fmt: skip
    write_text(path, page)
    return path


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _facts(results: Row) -> list[tuple[str, str]]:
    model, env = results["model"], results["environment"]
    versions = env["versions"]
    return [
        ("model", f"{Path(model['name']).name} ({model['class']}, {model['parameters'] / 1e6:,.1f} M parameters)"),
        ("dtype", model["dtype"]),
        ("device", f"{env['device']}: {env['device_name']}, {env['threads']} threads"),
        ("hfpatch", versions["hfpatch"] + (f" ({env['commit']})" if env["commit"] else "")),
        ("transformers", versions["transformers"]),
        ("torch", versions["torch"]),
        ("seed", str(results["seed"])),
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[Row]], starts: Sequence[int] = ()) -> Row:
    return {"header": header, "rows": [{"cells": r, "rule": n in starts} for n, r in enumerate(rows)]}


def _ratio(value: float, *, more_is_better: bool = True, clear: bool = True) -> Row:
    if not clear:
        return cell(f"~{value:.2f}")
    good = value >= 1.05 if more_is_better else value <= 0.95
    bad = value <= 0.95 if more_is_better else value >= 1.05
    return cell(f"{value:.2f}", "good" if good else "bad" if bad else "")


def _speed(row: Row, measure: str) -> Row:
    return _ratio(row[f"{measure}_speedup"], clear=row[f"{measure}_clear"] or row["variant"] == DENSE)


def _headline(results: Row) -> Row:
    rows = headline(results)
    columns = [
        ("score", "score", lambda r: cell(f"{r['score']:.0%}")),
        ("density", "keys attended", lambda r: cell(f"{r['density']:.0%}")),
        ("perplexity", "perplexity", lambda r: cell(f"{r['perplexity']:.2f}")),
        ("ttft", "prefill speed", lambda r: _ratio(r["ttft"], clear=r["ttft_clear"])),
        ("tpot", "decoding speed", lambda r: _ratio(r["tpot"], clear=r["tpot_clear"])),
        ("memory", "memory", lambda r: _ratio(r["memory"], more_is_better=False)),
    ]
    shown = [c for c in columns if any(r[c[0]] is not None for r in rows)]
    body = [[cell(r["variant"]), *(c[2](r) if r[c[0]] is not None else cell("") for c in shown)] for r in rows]
    return _table(["variant", *(c[1] for c in shown)], body)


def _section(job: Row, image: Path) -> Row:
    title, how = HOW[job["kind"]]
    table, lines = {
        "niah": _scores, "reader": _reader, "task": _scores, "lm-eval": _lm_eval, "perplexity": _perplexity,
        "latency": _latency, "memory": _memory,
    }[job["kind"]](job)  # fmt: skip
    title = title.format(label=job["label"])
    if job["label"] not in (job["kind"], title.split()[-1]):
        title = f"{title} ({job['label']})"
    return {
        "title": title,
        "how": how,
        "image": _data_uri(image),
        "wide": job["kind"] in ("niah", "reader", "latency"),
        "table": table,
        "lines": lines,
    }


def _pivot(job: Row) -> tuple[list[str], list[int]]:
    return list(dict.fromkeys(r["variant"] for r in job["rows"])), sorted({r["length"] for r in job["rows"]})


def _scores(job: Row) -> tuple[Row, list[str]]:
    names, lengths = _pivot(job)
    body = []
    for name in names:
        own = [r for r in job["rows"] if r["variant"] == name]
        cells = []
        for n in lengths:
            found = [r["score"] for r in own if r["length"] == n]
            cells.append(cell(f"{sum(found) / len(found):.0%}" if found else ""))
        last = max(own, key=lambda r: r["length"])
        body.append([cell(name), *cells, cell(f"{last['density_prefill']:.0%} / {last['density_decode']:.0%}")])
    header = ["score at", *map(tokens, lengths), f"keys attended at {tokens(lengths[-1])}, prefill / decoding"]
    return _table(header, body), [question_note(job["rows"])]


def _reader(job: Row) -> tuple[Row, list[str]]:
    names, lengths = _pivot(job)
    body = []
    for name in names:
        own = [r for r in job["rows"] if r["variant"] == name]
        last = [r for r in own if r["length"] == max(r["length"] for r in own)]
        kept = [r["kept"] for r in last if r["kept"] is not None]
        found = [cell(share([r for r in own if r["length"] == n])) for n in lengths]
        body.append([
            cell(name), *found, cell(f"{mean(kept):.0%}" if kept else "-"), cell(str(last[0]["chunks"] or "-")),
            cell(time_text(mean(r["seconds"] for r in last))), cell(memory_text(max(r["peak"] for r in last))),
        ])  # fmt: skip
    header = ["found at", *map(tokens, lengths), "facts kept", "chunks", "per text", "peak memory"]
    return _table(header, body), ["The last four columns are those of the variant's longest texts."]


def question_note(rows: Sequence[Row]) -> str:
    """Whether the question was prefilled under the patch."""
    inside = list(dict.fromkeys(r["variant"] for r in rows if r["question_in_sparse_part"]))
    outside = list(dict.fromkeys(r["variant"] for r in rows if not r["question_in_sparse_part"]))
    text = "The question stands at the end of the one prompt"
    if inside:
        text += f"; it was inside the sparse part for {', '.join(inside)}"
    return text + f"; no sparse prefill: {', '.join(outside)}."


def _lm_eval(job: Row) -> tuple[Row, list[str]]:
    rows = [
        [cell(r["task"]), cell(r["variant"]), cell(f"{r['score']:.4f}"), cell(r["metric"]), cell(str(r["samples"]))]
        for r in job["rows"]
    ]
    return _table(["task", "variant", "score", "metric", "samples"], rows), []


def _perplexity(job: Row) -> tuple[Row, list[str]]:
    names, lengths = _pivot(job)
    longest = [r for r in job["rows"] if r["length"] == lengths[-1]]
    spans = sorted({(r["start"], r["stop"]) for r in longest})
    spans = spans[:: -(-len(spans) // 6)]
    body = []
    for name in names:
        own = {(r["start"], r["stop"]): r["perplexity"] for r in longest if r["variant"] == name}
        body.append([cell(name), *(cell(f"{own[s]:.2f}" if s in own else "") for s in spans)])
    return _table(["perplexity", *(f"from {a}" for a, _ in spans)], body), []


def _starts(rows: Sequence[Row]) -> list[int]:
    return [n for n in range(1, len(rows)) if rows[n]["length"] != rows[n - 1]["length"]]


def _latency(job: Row) -> tuple[Row, list[str]]:
    rows = sorted(job["rows"], key=lambda r: r["length"])

    body = [
        [
            cell(r["variant"]), cell(tokens(r["length"])), cell(spread_text(r["ttft"])), _speed(r, "ttft"),
            cell(spread_text(r["tpot"])), _speed(r, "tpot"), cell(f"{r['tokens_per_second']:.1f}"),
        ]
        for r in rows
    ]  # fmt: skip
    header = ["variant", "prompt", "to first token", "× dense", "per token", "× dense", "tokens/s"]
    kinds = {"ttft": "prefill", "tpot": "decoding"}
    lines = [f"{b['variant']}: {kinds[b['measure']]} is {break_even_text(b)}." for b in job["break_even"]]
    loads = [r["load_before"] for r in rows if r["load_before"] is not None]
    if loads:
        lines.append(f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}.")
    return _table(header, body, _starts(rows)), lines


def _memory(job: Row) -> tuple[Row, list[str]]:
    rows = sorted(job["rows"], key=lambda r: r["length"])
    body = [
        [
            cell(r["variant"]), cell(tokens(r["length"])), cell(memory_text(r["peak_prefill"])),
            cell(memory_text(r["peak_decode"])), _ratio(r["ratio"], more_is_better=False),
        ]
        for r in rows
    ]  # fmt: skip
    return _table(["variant", "prompt", "prefill", "decoding", "/ dense"], body, _starts(rows)), [
        f"Measured by: {rows[0]['how']}."
    ]


def _variants(results: Row) -> Row:
    rows = []
    for v in results["variants"]:
        methods = v["patch"]["methods"] if v["patch"] else []
        text = "; ".join(
            m["method"] + " " + ", ".join(f"{k}={val}" for k, val in m.items() if k != "method" and val is not None)
            for m in methods
        )
        rows.append([cell(v["name"]), cell(", ".join(v["acts_in"]) or "-"), cell(text or "the model as it is")])
    return _table(["variant", "acts in", "settings"], rows)
