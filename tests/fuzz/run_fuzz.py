"""What fuzz tests of runs share: examples, a run with a job of every kind, and changes to its files."""

import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hfpatch.evals.run.runner import Run
from hfpatch.evals.run.variants import parse_variants
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from jobs_list import KINDS, VARIANTS

from hfpatch import HfpatchError

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hfpatch-hypothesis")  # nothing is left in the checkout
CPU_SECONDS = 20.0  # of one example; more is endless work

RUN = Run("every kind", "embedded", parse_variants(VARIANTS[1:]), [kind.job for kind in KINDS])
ENVIRONMENT = {
    "versions": {"hfpatch": "0.1.0", "torch": "2.7", "transformers": "5.2"}, "commit": None, "platform": "Linux",
    "device": "cpu", "device_name": "a CPU", "threads": 1,
}  # fmt: skip
MODEL = {"name": "embedded", "class": "LlamaForCausalLM", "parameters": 10**7, "dtype": "float32"}


def runs(few: int) -> pytest.MarkDecorator:
    """Parametrize `examples`: a few in the default suite, ten times as many under `-m slow`."""
    long = pytest.param(10 * few, marks=pytest.mark.slow, id="long")
    return pytest.mark.parametrize("examples", [pytest.param(few, id="short"), long])


def fixed(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run, however long one takes, and no files about them."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextmanager
def bounded() -> Iterator[None]:
    """A block that fails when it computes for too long; waiting for a busy machine does not count."""

    def endless(number: int, frame: Any) -> None:
        raise AssertionError(f"still at work after {CPU_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, endless)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def refused(call: Callable[[], Any]) -> str | None:
    """None when `call` returns, the sentence of our own exception; any other exception passes."""
    try:
        with bounded():
            call()
    except HfpatchError as error:
        told = str(error)
        assert told.strip() and "\n" not in told and len(told) < 3000
        return told
    return None


def record_of(job: Any, cell: Any) -> dict[str, Any]:
    """What the journal keeps of a cell."""
    found = next(kind for kind in KINDS if kind.job is job)
    return {"data": found.data(job), "samples": [{"output": "a\u2028b\x85"}], "seconds": 0.5, "model": MODEL}


NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**20, 10**99, -(10**99), 1.0, 0.5, -0.0, 1e-320, 1e308, float("nan")),
    *(float("inf"), "", " ", "x", "dense", "\u2028", "\x85", "\ud800", "\x00", "\x1b[31m", "[/red]", ":smile:"),
    *("../../x", "a/b", "a" * 3000, "\u0662", "9" * 5000, [], {}, [[]], [None], [{}], {"": 1}, {"a": {"a": [1]}}),
    *([1, 1], ["dense"], json.loads("[" * 70 + "]" * 70), {"methods": [{"method": "x"}]}, {"method": 5}),
]
BITS = [
    *(b"\n", b"\n\n", b"\r", b"\t", b" ", b"\0", b"\0\0\0\n", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85"),
    *(b"[", b"]", b"{", b"}", b",", b":", b": ", b"- ", b"? ", b'"', b"'", b"#", b"|", b">", b"%YAML 9.9\n", b"---\n"),
    *(b"&a ", b"*a", b"&a [*a]", b"<<: *a\n", b"<<: 5\n", b"!!int ", b"!!float ", b"!!bool ", b"!!binary ", b"!!set "),
    *(b"!!python/object/apply:os.getcwd []", b"!!timestamp ", b"!!null ", b"! ", b"0x_", b"1:1:1", b".inf", b".nan"),
    *(b"9" * 5000, b"[" * 3000, b"{a: " * 1000, b"- " * 3000, b'"\\ud800"', b'"\\UFFFFFFFF"', b"\\u0000", b"null"),
    *(b"true", b"1e999", b"NaN", b"-1", b"1.0", b"model: x\n", b'{"cell": "x"}\n', b'{"run": {}}\n', b"5\n", b"[]\n"),
    b"x: &x [1,1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (120 if c == 97 else c - 1)] * 9)) for c in b"abcdefgh"
    ),
]  # fmt: skip


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes with one to three stretches cut out, doubled, moved or replaced, most of them short or whole lines."""
    for _ in range(draw(st.integers(1, 3))):
        edges = [0, *(n + 1 for n, c in enumerate(raw) if c == 10), len(raw)]
        anywhere = st.one_of(st.integers(0, len(raw)), st.sampled_from(edges))
        start, stop = sorted((draw(anywhere), draw(anywhere)))
        if draw(st.booleans()):
            stop = min(start + draw(st.integers(0, 3)), len(raw))
        bit = draw(st.one_of(st.sampled_from(BITS), st.binary(max_size=3), st.just(raw[start:stop] * 2), st.just(b"")))
        raw = raw[:start] + bit + raw[stop:]
        if draw(st.integers(0, 9)) == 0:
            raw = raw[: draw(anywhere)]
    return raw


def places(data: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in the data something stands."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [where, *(p for key, value in inner for p in places(value, (*where, key)))]


@st.composite
def changed_data(draw: st.DrawFn, data: Any) -> Any:
    """Plain data with one to three values replaced, left out, doubled, or under another name."""
    for _ in range(draw(st.integers(1, 3))):
        data = json.loads(json.dumps(data))
        where = draw(st.sampled_from(places(data)))
        new = draw(st.one_of(st.sampled_from(NASTY), st.integers(), st.floats(), st.text(max_size=5)))
        if not where:
            return new
        *path, last = where
        parent = data
        for key in path:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "more"]))
        if how == "replace":
            parent[last] = new
        elif how == "drop":
            del parent[last]
        elif isinstance(parent, list):
            parent.append(parent[last])
        else:
            parent[draw(st.sampled_from([str(new)[:40], last + "x", "name", "patch", "methods"]))] = parent[last]
    return data
