"""The answer in a few numbers: per variant its accuracy, density, speed and memory against dense."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from ..run.variants import DENSE

Row = dict[str, Any]
SCORED = ("niah", "task", "lm-eval")
MANY = 6


def density(row: Row, variant: Row | None = None) -> float:
    """Share of the keys attended to, in the prefill if the patch acts there, else in decoding."""
    acts_in = variant["acts_in"] if variant else []
    return float(row["density_decode"] if acts_in == ["decode"] else row["density_prefill"])


def names(results: Row) -> list[str]:
    """Variants in order."""
    return [v["name"] for v in results["variants"]]


def jobs(results: Row, *kinds: str) -> list[Row]:
    """Jobs of these kinds, in order."""
    return [j for j in results["jobs"] if j["kind"] in kinds]


def score_points(results: Row) -> list[Row]:
    """For every variant, its mean score and density over the scored jobs."""
    variants = {v["name"]: v for v in results["variants"]}
    points = []
    for name in names(results):
        rows = [r for j in jobs(results, *SCORED) for r in j["rows"] if r["variant"] == name]
        if rows:
            points.append(
                {
                    "variant": name,
                    "score": mean(r["score"] for r in rows),
                    "density": mean(density(r, variants[name]) for r in rows),
                }
            )
    return points


def headline(results: Row) -> list[Row]:
    """One row per variant; None where nothing was measured. Speed and memory are those of the longest prompts."""
    scores = {p["variant"]: p for p in score_points(results)}
    return [
        {
            "variant": name,
            "score": scores[name]["score"] if name in scores else None,
            "density": scores[name]["density"] if name in scores else None,
            "ttft": _longest(results, "latency", name, "ttft_speedup"),
            "tpot": _longest(results, "latency", name, "tpot_speedup"),
            "ttft_clear": name == DENSE or _longest(results, "latency", name, "ttft_clear") == 1,
            "tpot_clear": name == DENSE or _longest(results, "latency", name, "tpot_clear") == 1,
            "memory": _longest(results, "memory", name, "ratio"),
            "perplexity": _longest(results, "perplexity", name, "perplexity"),
        }
        for name in names(results)
    ]


def _longest(results: Row, kind: str, name: str, key: str) -> float | None:
    rows = [r for j in jobs(results, kind) for r in j["rows"] if r["variant"] == name]
    if not rows:
        return None
    length = max(r["length"] for r in rows)
    return mean(float(r[key]) for r in rows if r["length"] == length)


def sentences(results: Row) -> list[str]:
    """What the headline says, in words: a sentence per variant but dense, or, of many, which stand out."""
    told = []
    dense, *others = headline(results)
    if len(others) > MANY and dense["score"] is not None:
        return _of_many(dense, others)
    for row in others:
        parts = []
        if row["score"] is not None and dense["score"] is not None:
            parts.append(f"scores {row['score']:.0%} where dense scores {dense['score']:.0%}")
            parts.append(f"attends to {row['density']:.0%} of the keys")
        if row["perplexity"] is not None and dense["perplexity"] is not None:
            parts.append(f"has a perplexity of {row['perplexity']:.2f} against {dense['perplexity']:.2f}")
        if row["ttft"] is not None:
            prefill, decode = (_speed(row, m) for m in ("ttft", "tpot"))
            parts.append(f"prefills {prefill} and decodes {decode}")
        if row["memory"] is not None:
            parts.append(f"needs {row['memory']:.2f} times the memory on top of the model")
        if parts:
            told.append(f"{row['variant']} " + _list(parts) + ".")
    return told


def _of_many(dense: Row, others: Sequence[Row]) -> list[str]:
    """Which variants keep dense's score, what the others lose, and which of the former are faster or leaner."""
    score = dense["score"]
    kept = [r for r in others if r["score"] is not None and r["score"] >= score]
    lost = sorted((r for r in others if r["score"] is not None and r["score"] < score), key=lambda r: -r["score"])
    told = [f"{len(kept)} of {len(kept) + len(lost)} variants score what dense scores, {score:.0%}, or more."]
    if lost:
        told.append("Below it: " + _list([f"{r['variant']} with {r['score']:.0%}" for r in lost]) + ".")
    for measure, verb in (("ttft", "prefill"), ("tpot", "decode")):
        if any(r[measure] is None for r in kept):
            continue
        fast = sorted((r for r in kept if r[measure] > 1 and r[f"{measure}_clear"]), key=lambda r: -r[measure])
        named = _list([f"{r['variant']} ({r[measure]:.2f} x)" for r in fast]) if fast else "none"
        told.append(f"Of those that keep the score, these {verb} clearly faster than dense: {named}.")
    lean = sorted((r for r in kept if r["memory"] is not None and r["memory"] < 0.95), key=lambda r: r["memory"])
    if lean:
        named = _list([f"{r['variant']} ({r['memory']:.2f} x)" for r in lean])
        told.append(f"These also need less memory on top of the model: {named}.")
    return told


def _speed(row: Row, measure: str) -> str:
    return f"{row[measure]:.2f} times as fast" if row[f"{measure}_clear"] else "about as fast (the spreads overlap)"


def _list(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
