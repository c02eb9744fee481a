"""One self-contained HTML page per run."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from ..jobs.view import HeatMap, Lines, Table, View
from ..run.results import write_text
from .page_template import STYLE, TABLE, TEMPLATE
from .summary import answer_table, aspects_of, headline, sentences, views

Row = dict[str, Any]


def write_page(results: Row, images: Mapping[str, Path], density: Path | None, path: Path) -> Path:
    """Write the page, images inside; returns its path."""
    jinja = Environment(autoescape=True, trim_blocks=True)
    inner = jinja.from_string(TABLE)
    shown = views(results)
    found = headline(results, shown)
    environment = results["environment"]
    page = jinja.from_string(TEMPLATE).render(
        title=results["title"], about=results["about"], style=STYLE, facts=_facts(results),
        table=lambda t: Markup(inner.render(t=t)), answer=answer_table(found), sentences=sentences(found),
        meanings=dict.fromkeys(a.meaning for a in aspects_of(found)), notes=results.get("notes", []),
        density_image=_data_uri(density) if density else None,
        sections=[_section(v, images[job["label"]]) for v, job in zip(shown, results["jobs"], strict=True)],
        variants=_variants(results),
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


def _section(view: View, image: Path) -> Row:
    wide = isinstance(view.plot, HeatMap) or (isinstance(view.plot, Lines) and len(view.plot.panels) > 2)
    return {"view": view, "image": _data_uri(image), "wide": wide}


def _variants(results: Row) -> Table:
    rows = []
    for v in results["variants"]:
        methods = v["patch"]["methods"] if v["patch"] else []
        text = "; ".join(
            m["method"] + " " + ", ".join(f"{k}={val}" for k, val in m.items() if k != "method" and val is not None)
            for m in methods
        )
        rows.append([v["name"], ", ".join(v["acts_in"]) or "-", text or "the model as it is"])
    return Table("", ["variant", "acts in", "settings"], rows)
