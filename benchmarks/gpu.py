"""Ten minutes on a GPU that settle whether hfpatch is right and fast there; results in gpu.json and gpu.md.

PYTHONPATH=. python benchmarks/gpu.py --out gpu-results                 # all parts in 480 s, shared out among them
PYTHONPATH=. python benchmarks/gpu.py --out gpu-results --parts 0 1 3   # some of them
PYTHONPATH=. python benchmarks/gpu.py --out gpu-results --dry           # every part at tiny sizes on a CPU

Each part works in processes of its own: what crashes, hangs or reads the wrong memory costs its case alone. A row is
a line of JSON, printed at once. No time is given for what is not right first. docs/results-gpu.md says what is shown.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_parts.parent import Run
from gpu_parts.plan import PARTS
from gpu_parts.summary import bars_text, write


def main() -> int:
    """Command line; 1 when something was wrong, failed or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    about = "; ".join(f"{n} {part.about}" for n, part in PARTS.items())
    parser.add_argument("--parts", nargs="+", type=int, choices=PARTS, default=list(PARTS), help=about)
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--case", type=float, default=25, help="seconds after which a case is given up")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json, gpu.md, rows and log"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny sizes on a CPU: shows that the script works, no figures"
    )
    parser.add_argument(
        "--with",
        dest="extra",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Python files that register executors of one's own",
    )
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.jsonl", "gpu.log"):
        (args.out / name).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = args.out.resolve()
    options = {"dry": args.dry, "extra": tuple(os.path.abspath(f) for f in args.extra)}
    run = Run(folder, args.budget, args.case, options)
    run.run(sorted(set(args.parts)), lambda run: write(run, folder))
    print(bars_text(run.rows, args.dry))
    return int(any(row["status"] in ("wrong", "failed", "missing") for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
