"""Settings nobody thought of: every method takes them or says what is wrong, and never breaks later."""

import dataclasses
import json
import math
import typing
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods_list import EVICTING, METHODS
from patch_fuzz import fixed, refused_or_finite, runs

from hfpatch import HfpatchError, MethodConfig, PatchConfig, list_methods
from hfpatch.config import registry
from hfpatch.config.registry import make_config

NAMES = [*sorted(registry._builtin_names()), *registry.list_presets()]
LARGE = [2**31 - 1, 2**31, 2**63, 2**64, 10**400, -(2**31), -(2**63)]
NUMBERS = [
    *(0, 1, 2, 3, 5, 8, 64, -1, *LARGE),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-300, 5e-324, 1e-7, 3e38, 3.5e38, 1e300, math.nan, math.inf, -math.inf, -0.5),
    *(
        np.int64(3),
        np.int8(-1),
        np.uint64(2**64 - 1),
        np.float32(0.5),
        np.float64("nan"),
        np.float16(2),
        np.bool_(True),
    ),
    *(Fraction(1, 2), Decimal("0.5"), 1j, True, False),
]
TEXTS = [
    "",
    " ",
    "x",
    "3",
    "0.5",
    "1-",
    "0-1,1",
    "-1",
    "9" * 5000,
    "1-²",
    "a" * 5000,
    "\0",
    "\ud800",
    "{}",
    "5/N",
    "1e400/N",
    "nan/N",
]


class Odd:
    """Something with a repr of its own."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def odd_things() -> list[Any]:
    """Values of types no setting has, new for every draw: some change as they are read."""
    ring: list[Any] = []
    ring.append(ring)
    return [
        None, b"x", Path("x"), {1}, frozenset(), {}, {"a": 1}, {1: 2}, object(), Odd(), int, range(2), iter([1]),
        (n for n in [1]), np.array([1]), np.array([[0, 1]]), torch.tensor(3), torch.ones(2), 10**5000, ring,
        {"a": ring}, lambda: 1,
    ]  # fmt: skip


numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS) | st.text(max_size=8)
odd = st.integers(0, len(odd_things()) - 1).map(lambda n: odd_things()[n])  # not sampled: some have no repr
nested = st.recursive(numbers | texts | odd, lambda x: st.lists(x, max_size=4) | st.tuples(x, x), max_leaves=5)
hostile = st.one_of(st.sampled_from(LARGE), numbers, texts, odd, nested)


pairs = st.tuples(st.integers(0, 3), st.integers(0, 3))
OWN: dict[str, st.SearchStrategy[Any]] = {
    "layers": st.sampled_from([None, None, 1, -1, "1-", "0,2", [0, 1], (3,), range(1, 4)]),
    "executor": st.sampled_from([None, None, "torch", "reference"]),
    "heads": st.none()
    | st.lists(pairs, min_size=1, max_size=4, unique=True)
    | st.lists(st.integers(0, 3), max_size=3),
    "scales": st.lists(pairs, max_size=3, unique=True).map(lambda x: [[*p, 0.5] for p in x]),
    "gammas": st.none() | st.lists(st.floats(0.01, 9), min_size=4, max_size=4),
    "depth": st.sampled_from(["all", "shallow", "middle,deep"]),
    "threshold": st.none() | st.floats(-3, 3) | st.sampled_from(["5/N", "0.1/N"]),
    "sparse": st.sampled_from(["streaming", "block_topk", "dhsa", "quest"]),
    "sparse_settings": st.sampled_from([{}, {"window": 5}, {"budget": 0.5}]),
    "dense_layers": st.integers(0, 3),
    "layer_sharing_span": st.integers(0, 5),
    "template": st.just("{context} {question}"),
    **dict.fromkeys(["predictor", "weights", "head_config"], st.none()),
}


def fitting(hint: Any, meta: Any) -> st.SearchStrategy[Any]:
    """Values a field of this type may well take, the largest among them."""
    if meta.get("choices"):
        return st.sampled_from(meta["choices"])
    if args := typing.get_args(hint):
        return st.one_of([fitting(a, meta) for a in args])
    low = max((meta[k] for k in ("ge", "gt") if meta.get(k) is not None), default=-4)
    least, most = math.floor(low) + (meta.get("gt") is not None), meta.get("le")
    if hint is int:
        return st.integers(least, least + 40) | st.integers(least, least + 40) | st.integers(least, 2**31 - 1)
    if hint is float:
        return st.floats(low, 1.0 if most is None else most, exclude_min=meta.get("gt") is not None)
    return {bool: st.booleans(), type(None): st.none(), str: texts}[hint]


@cache
def settings_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of a method or preset: some that make it sparse on short prompts, a few others, at times wrong ones."""
    preset = make_config(name, {})
    hints = typing.get_type_hints(type(preset))
    fields = {
        f.name: OWN[f.name] if f.name in OWN else fitting(hints[f.name], f.metadata)
        for f in dataclasses.fields(preset)
    }
    bases = [case.settings for case in [*METHODS, *EVICTING] if case.name == preset.method] or [{}]
    other = st.sampled_from(sorted(fields)).flatmap(lambda f: st.tuples(st.just(f), fields[f]))
    others = st.lists(other, max_size=4).map(dict)
    near = {"layers": None, "dense_layers": 0, "min_length": 0, "boundaries": "novelty"}
    near = {k: v for k, v in near.items() if k in fields}
    wrong = st.dictionaries(st.sampled_from([*fields, "windwo"]), hostile, min_size=1, max_size=2)
    some = st.booleans().flatmap(lambda is_wrong: wrong if is_wrong else st.just(dict[str, Any]()))
    parts = st.tuples(st.just(near), st.sampled_from(bases), others, some)
    return parts.map(lambda found: {k: v for part in found for k, v in part.items()})


@pytest.mark.parametrize("name", NAMES)
@runs(50)
def test_settings_are_refused_or_give_finite_logits(name: str, examples: int) -> None:
    ran: list[bool] = []

    @fixed(examples)
    @given(settings_of(name))
    def run(given_settings: dict[str, Any]) -> None:
        ran.append(refused_or_finite(lambda: (PatchConfig([make_config(name, given_settings)]), {})))

    run()
    assert sum(ran) >= len(ran) / 10  # it is not all refusals


@runs(400)
def test_what_is_taken_survives_json(examples: int) -> None:
    @fixed(examples)
    @given(st.sampled_from(list_methods()).flatmap(lambda n: st.tuples(st.just(n), settings_of(n))))
    def run(drawn: tuple[str, dict[str, Any]]) -> None:
        name, values = drawn
        try:
            config = make_config(name, values)
        except HfpatchError:
            return
        saved = json.dumps(PatchConfig([config]).to_dict(), allow_nan=False)
        again = PatchConfig.from_dict(json.loads(saved)).methods[0]
        assert isinstance(config, MethodConfig) and again == config

    run()


@runs(100)
def test_methods_and_their_settings_may_be_anything(examples: int) -> None:
    """`patch_model` and `PatchConfig.from_dict` on things that are no method, no list of methods, no object."""
    entry = st.dictionaries(texts | numbers.filter(lambda n: n == n), hostile, max_size=3)
    named = st.builds(lambda e, n: {**e, "method": n}, entry, st.sampled_from(NAMES) | hostile)
    data = st.builds(lambda e, m: {**e, "methods": m}, entry, st.lists(entry | named, max_size=2) | hostile)

    @fixed(examples)
    @given(hostile | st.lists(st.sampled_from(NAMES) | hostile, max_size=3), data | hostile)
    def run(method: Any, plain: Any) -> None:
        refused_or_finite(lambda: (method, {}))
        refused_or_finite(lambda: (PatchConfig.from_dict(plain), {}))

    run()
