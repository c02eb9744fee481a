"""A process of a part: runs its cases one after the other and tells the parent of each row at once."""

import os
import runpy
import sys
import time
import traceback
from importlib import import_module
from multiprocessing.connection import Connection

from gpu_parts.plan import FAILED, PARTS, ROOT, Case, Options, first_line

BROKEN = 70  # exit status: the card answers with errors from here on, so that the next case needs a new process


def serve(pipe: Connection, part: int | None, lane: int, lanes: int, options: Options) -> None:
    """Run every case of the lane that is not done; without a part, see only whether the card answers."""
    os.setsid()
    log = os.open(options.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for folder in (ROOT, ROOT / "benchmarks", ROOT / "benchmarks" / "ops", ROOT / "tests", ROOT / "tests" / "ops"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    try:
        cases = _cases(part, options, pipe)
    except BaseException as e:
        traceback.print_exc()
        pipe.send({"broken": first_line(e)})
        return
    mine = [c for c in cases if c.group % lanes == lane]
    pipe.send({"cases": [c.name for c in mine]})
    for case in mine:
        if case.name not in options.done:
            _run(case, pipe)
    print(f"part {part}, lane {lane}: {time.process_time():.1f} s of CPU", flush=True)


def _cases(part: int | None, options: Options, pipe: Connection) -> list[Case]:
    from gpu_parts.context import Context

    context = Context.start(options)
    pipe.send({"ready": context.device.card})
    if part is None:
        return []
    for path in options.extra:
        runpy.run_path(path)
    return import_module(f"gpu_parts.{PARTS[part].module}").cases(context)


def _run(case: Case, pipe: Connection) -> None:
    from gpu_parts.device import is_card_trouble

    pipe.send({"begin": case.name, "family": case.family, "limit": case.limit})
    start, broken = time.perf_counter(), False
    try:
        for row in case.run():
            pipe.send({"row": row})
    except Exception as e:
        print(f"== {case.name}", file=sys.stderr)
        traceback.print_exc()
        pipe.send({"row": {"status": FAILED, "why": f"{first_line(e)} ({_place(e)})"}})
        broken = is_card_trouble(e)
    pipe.send({"end": case.name, "s": time.perf_counter() - start})
    if broken:
        os._exit(BROKEN)
    _free()


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


def _free() -> None:
    """Give memory back that a case left, so that a case that ran out of it is the only one."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
