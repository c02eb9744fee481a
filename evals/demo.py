"""The demonstration: dense against streaming on the embedded model."""

from typing import Any

from .jobs.latency import LatencyJob
from .jobs.niah import NiahJob
from .run.runner import Run
from .run.stats import break_even_text
from .run.variants import DENSE, parse_variants

WINDOW = 512
PATCH = f"streaming:window={WINDOW}"


def demo_run(model: str = "embedded") -> Run:
    """A needle grid and a latency measurement that take a few minutes on two cores."""
    return Run(
        "demo",
        model,
        parse_variants([PATCH]),
        [NiahJob([512, 1024, 2048, 4096], samples=2), LatencyJob([1024, 4096, 16384], decode_tokens=16)],
        about=(
            f"Dense attention against streaming (4 first tokens and the last {WINDOW}): "
            "can the model still find a sentence hidden in its prompt, and what does that cost?"
        ),
    )


def meaning(results: dict[str, Any]) -> list[str]:
    """Two sentences on what the numbers say."""
    needles, latency = results["jobs"]

    def found(name: str) -> float:
        scores = [r["score"] for r in needles["rows"] if r["variant"] == name]
        return sum(scores) / len(scores)

    longest = max((r for r in latency["rows"] if r["variant"] != DENSE), key=lambda r: r["length"])
    prefill = next(b for b in latency["break_even"] if b["measure"] == "ttft")
    return [
        f"Accuracy: dense found {found(DENSE):.0%} of the needles, streaming {found(PATCH):.0%}; it loses those that "
        f"lie outside its window of {WINDOW} tokens, which no speed buys back.",
        f"Speed: streaming attends to {longest['density_prefill']:.0%} of the keys at {longest['length']:,} tokens "
        f"and starts answering {longest['ttft_speedup']:.1f} times as fast as dense there; its prefill is "
        f"{break_even_text(prefill)}.",
    ]
