"""`python -m pretend` in tests/: operations and waits for the GPU of patched layers, counted without one."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from methods_list import METHODS

from . import page
from .counting import EXECUTORS, PHASES, WAYS, Counted, count


def main() -> int:
    """Run the command line; 1 where something a GPU refuses was found."""
    parser = argparse.ArgumentParser(prog="python -m pretend", description=__doc__)
    names = [str(case) for case in METHODS]
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(names)}; all when none are named")
    parser.add_argument("--executors", nargs="+", default=EXECUTORS, choices=EXECUTORS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--model", default="llama", help="a model of the zoo; the table is of llama")
    parser.add_argument("--write", action="store_true", help=f"put what was counted into {page.PATH.name}")
    parser.add_argument("--operations", action="store_true", help="name the operations of each phase")
    asked = parser.parse_args()
    if unknown := set(asked.methods) - set(names):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}")
    table, faults = page.read() if asked.write else {}, False
    for case in METHODS:
        if asked.methods and str(case) not in asked.methods:
            continue
        for executor in asked.executors:
            for way in asked.ways:
                counted = count(case, executor, way, asked.model)
                cells = page.cells(counted)
                table[way, str(case), executor] = cells
                print(f"{case} {executor}, {way}: " + "; ".join(f"{p} {cells[p]}" for p in PHASES), flush=True)
                print(f"  logits {counted.error:.1e} from the CPU's")
                _explain(counted, asked.operations)
                faults |= any(c.faults for calls in counted.calls.values() for c in [*calls, counted.outside])
        if asked.write:
            page.write(table)
    return int(faults)


def _explain(counted: Counted, operations: bool) -> None:
    """Where the waits and faults of a run come from, per layer call; on demand the operations too."""
    places: dict[str, list[str]] = defaultdict(list)
    for phase in PHASES:
        calls = counted.calls[phase]
        for kind, what in (("wait", "waits"), ("FAULT", "faults")):
            for place, n in sum((getattr(c, what) for c in calls), Counter[str]()).items():
                places[f"{kind} {place}"].append(f"{phase} {n / len(calls):.2g}")
        if operations:
            total = sum((c.names for c in calls), Counter[str]())
            print(f"  {phase}: " + ", ".join(f"{name} {n / len(calls):.3g}" for name, n in total.most_common()))
    for place, phases in sorted(places.items()):
        print(f"  {place}: {', '.join(phases)}")
    for place in {**counted.outside.waits, **counted.outside.faults}:
        if place.startswith("hfpatch"):
            print(f"  between layers: {place}")


if __name__ == "__main__":
    sys.exit(main())
