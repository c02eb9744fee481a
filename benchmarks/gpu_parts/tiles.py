"""Part 6: other tile sizes for the Triton kernel, each checked, against those that it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from gpu_parts.context import Context
from gpu_parts.exact import checked, exact, judge, run, sampled
from gpu_parts.kernels import Timed
from gpu_parts.plan import OK, SKIPPED, Case, Row
from gpu_parts.problems import Spec
from hfpatch.ops import triton_executor
from hfpatch.ops.call import Problem

# rows, keys, warps, stages of each shape
SWEEP: dict[str, list[tuple[int, int, int, int]]] = {
    "prefill blocks D128": [
        (128, 128, 8, 2), (128, 64, 8, 4), (128, 64, 8, 2), (128, 128, 8, 3),
        (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4),
    ],
    "prefill causal D128": [(128, 128, 8, 2), (128, 64, 8, 4), (128, 128, 8, 3), (64, 64, 4, 4)],
    "prefill blocks D256": [(128, 32, 8, 2), (64, 32, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
    "decode blocks D128": [
        (16, 128, 4, 3), (16, 128, 4, 2), (16, 128, 8, 3), (16, 64, 4, 4), (16, 64, 2, 4), (16, 32, 4, 4),
    ],
}  # fmt: skip
LENGTH = {"prefill": "32k", "decode": "128k"}  # in a dry run the shortest


def cases(context: Context) -> list[Case]:
    """A case per shape and tile."""
    if not hasattr(triton_executor, "Tiles"):
        return [Case("tiles", partial(_nothing, "the Triton executor has no Tiles to change"))]
    return [
        Case(f"{shape} {'x'.join(map(str, tile))}", partial(_sweep, context, shape, tile))
        for shape, found in SWEEP.items()
        for tile in (found[:1] if context.dry else found)
    ]


def variants(context: Context) -> list[tuple[str, Callable[[], Any]]]:
    """What Triton has to compile for this part."""
    if not hasattr(triton_executor, "Tiles"):
        return []
    return [
        (f"tile {shape} {tile}", partial(_launch, context, shape, tile))
        for shape, found in SWEEP.items()
        for tile in found
    ]


def _nothing(why: str) -> Iterator[Row]:
    yield {"status": SKIPPED, "why": why}


def _launch(context: Context, shape: str, tile: tuple[int, ...]) -> Callable[[], Any]:
    p = _problem(context, shape, short=True)

    def launch() -> None:
        with _tiles(tile):
            run(p, "triton")

    return launch


def _problem(context: Context, shape: str, short: bool = False) -> Problem:
    phase, kind, width = shape.split()
    if width == "D256":
        tokens = 64 if context.dry else 2048 if short else 16384
        return Spec("blocks128", 8, 2, tokens, tokens, 256, 256).make(context.device.torch)
    return Timed(phase, kind, "8k" if short or context.dry else LENGTH[phase]).problem(context)


@lru_cache(maxsize=1)
def _truth(context: Context, shape: str) -> tuple[Any, ...]:
    p = _problem(context, shape)
    rows = sampled(p)
    return p, rows, exact(p, rows), checked(p, "triton", context.options.failed)


@contextmanager
def _tiles(tile: tuple[int, ...]) -> Iterator[None]:
    """Every launch takes this tile inside the block."""
    kept = triton_executor.Tiles.__dict__["of"]
    triton_executor.Tiles.of = classmethod(lambda cls, *sizes: cls(*tile))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        triton_executor.Tiles.of = kept  # type: ignore[method-assign]


def _sweep(context: Context, shape: str, tile: tuple[int, int, int, int]) -> Iterator[Row]:
    p, rows, truth, own = _truth(context, shape)
    row: Row = {"shape": shape, "tile": list(tile)}
    if own["status"] != OK:
        yield {**row, **own}
        return
    with _tiles(tile):
        found = judge(p, "triton", truth, rows, repeats=2)
    if found["status"] != OK:
        yield {**row, **found}
        return

    def tiled() -> Any:
        with _tiles(tile):
            return run(p, "triton")

    calls = {"own": partial(run, p, "triton"), "tile": tiled}
    if shape.startswith("decode"):
        graphs = {name: context.device.replay(call) for name, call in calls.items()}
        if why := "; ".join(reason for _, reason in graphs.values() if reason):
            yield {**row, **found, "status": SKIPPED, "why": f"no graph: {why}"}
            return
        calls = {name: graph for name, (graph, _) in graphs.items() if graph is not None}
    ms = context.device.times(calls, seconds=1.0)
    yield {**row, **found, **ms["tile"], "own_ms": ms["own"]["ms"], "ratio": ms["own"]["ms"] / ms["tile"]["ms"]}
