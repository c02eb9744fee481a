"""`python -m survey` in tests/: is hfpatch right on these model types, or on all of them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import page
from .build import CAUSAL, VISION
from .judge import judge
from .pool import TIMEOUT, run_all
from .verdict import NOT_BUILT, WRONG, Verdict


def main() -> int:
    """Run the command line; 1 when a type is wrong and the table was not asked for."""
    parser = argparse.ArgumentParser(prog="python -m survey", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types, such as llama")
    parser.add_argument("--all", action="store_true", help="every causal and every image-text type")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds per type")
    asked = parser.parse_args()
    names = [*CAUSAL, *VISION] if asked.all else asked.types
    unknown = [name for name in names if name not in CAUSAL and name not in VISION]
    if unknown or not names:
        parser.error(f"unknown types: {', '.join(unknown)}" if unknown else "name types or pass --all")
    start, verdicts = time.time(), []
    for name, result in run_all(judge, names, asked.workers, asked.timeout):
        verdict = result if isinstance(result, Verdict) else Verdict(name, NOT_BUILT, result)
        verdicts.append(verdict)
        word, layers, reason = page.cells(verdict)
        print(f"{name:28} {word:10} {layers:10} {reason}", flush=True)
    busy = sum(verdict.seconds for verdict in verdicts)
    print(f"{len(verdicts)} types in {time.time() - start:.0f} s, {busy:.0f} s of them computing", file=sys.stderr)
    if asked.write:
        asked.write.write_text(page.render(verdicts))
        return 0
    return int(any(verdict.verdict == WRONG for verdict in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
