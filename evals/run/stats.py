"""Medians, spreads, intervals and break-even lengths."""

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import mean, median, quantiles, stdev
from typing import Any

from hfpatch.calibrate.intervals import wilson_of
from hfpatch.core.audit_report import student

GIB = 2**30


def summarise(runs: Sequence[float]) -> dict[str, Any]:
    """Median with its spread: the quartiles of four or more runs, else the extremes."""
    if len(runs) >= 4:
        low, _, high = quantiles(runs, n=4, method="inclusive")
        kind = "quartiles"
    else:
        low, high, kind = min(runs), max(runs), "extremes"
    return {"median": median(runs), "low": low, "high": high, "spread": kind, "runs": list(runs)}


def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the spreads of two summaries do not overlap: only then is one called faster."""
    return bool(a["high"] < b["low"] or b["high"] < a["low"])


def interval(score: float, samples: int) -> tuple[float, float]:
    """95 % Wilson interval of a mean score in [0, 1] of so many samples; wide where a score is a share of answers."""
    p = min(max(float(score), 0.0), 1.0)
    low, high = wilson_of(p, samples)
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and its 95 % interval (Student's t), which a single value has not got."""
    if len(values) < 2:
        return mean(values), None, None
    middle, half = mean(values), student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


def break_even(speedups: Mapping[int, float], clear: Collection[int]) -> dict[str, Any]:
    """From which length on a variant is faster than dense, given `length -> dense time / its time`.

    Faster counts at the lengths in `clear`, where the spreads do not overlap. Interpolated linearly in the logarithms
    of length and speed-up; `relation` is "about" then, "at most" when it is faster at all lengths measured, "after"
    when it is at later lengths but the spread hides where that begins, "above" when it is not at the longest.
    """
    lengths = sorted(speedups)
    slower = [n for n in lengths if speedups[n] < 1 or n not in clear]
    if not slower:
        return {"relation": "at most", "length": lengths[0]}
    last = slower[-1]
    if last == lengths[-1]:
        return {"relation": "above", "length": last}
    after = lengths[lengths.index(last) + 1]
    if speedups[last] >= 1:
        return {"relation": "after", "length": last}
    a, b = math.log(speedups[last]), math.log(speedups[after])
    return {"relation": "about", "length": round(last * (after / last) ** (-a / (b - a)))}


def tokens(n: int) -> str:
    """A length as people write it: 512, 1k, 1.5k, 32k."""
    return f"{n / 1024:g}k" if n >= 1024 and n % 512 == 0 else str(n)


def memory_text(amount: float) -> str:
    """Bytes with a fitting unit."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB else f"{amount / 2**20:.0f} MiB"


def time_text(seconds: float) -> str:
    """Seconds with a fitting unit."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def spread_text(summary: Mapping[str, Any]) -> str:
    """A median of seconds with its spread, all in one unit."""
    unit, factor = ("s", 1) if summary["median"] >= 1 else ("ms", 1000)
    decimals = 2 if summary["median"] * factor < 10 else 1 if summary["median"] * factor < 100 else 0
    middle, low, high = (f"{summary[k] * factor:.{decimals}f}" for k in ("median", "low", "high"))
    return f"{middle} {unit} ({low}..{high})"


def break_even_text(found: Mapping[str, Any]) -> str:
    """A break-even length in words."""
    length = f"{found['length']:,}"
    if found["relation"] == "about":
        return f"faster than dense from about {length} tokens on"
    if found["relation"] == "at most":
        return f"faster than dense at all lengths measured ({length} tokens and more)"
    if found["relation"] == "after":
        return f"faster than dense somewhere after {length} tokens, where the spread hides it"
    return f"not clearly faster than dense up to {length} tokens"


def share(rows: Sequence[Mapping[str, Any]]) -> str:
    """Found of asked, over the depths of one length; nothing where nothing was asked."""
    asked = sum(r["samples"] for r in rows)
    return f"{round(sum(r['score'] * r['samples'] for r in rows))} of {asked}" if asked else ""
