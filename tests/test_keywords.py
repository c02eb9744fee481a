"""Early warning: a new release of Transformers that hands other keywords to attention is told by name and type."""

from __future__ import annotations

from typing import Any

import pytest
from survey import keywords
from survey.sources import read_sources

LIST = keywords.saved()
LISTED = keywords.release(LIST["transformers"])


ADVICE = (
    "Decide for each new keyword whether hfpatch may act on calls that carry it, and whether it still finds the cache "
    f"and the layer; then write the list anew: `{keywords.COMMAND}` in tests/."
)


def compare(section: str, found: dict[str, Any]) -> None:
    """Fail with what has changed since the list was written."""
    changed = keywords.differences(LIST[section], found)
    installed = ".".join(map(str, keywords.release()))
    heading = f"Transformers {installed} is not what the list of {LIST['transformers']} has:"
    assert not changed, "\n- ".join([heading, *changed]) + f"\n{ADVICE}"


newer_or_same = pytest.mark.skipif(
    keywords.release() < LISTED,
    reason=f"the list is of Transformers {LIST['transformers']}: an older release has other names, and nothing new",
)


@newer_or_same
def test_sources_hold_no_keyword_that_is_not_listed() -> None:
    compare("read", read_sources())


@newer_or_same
@pytest.mark.slow
def test_running_models_hand_on_no_keyword_that_is_not_listed() -> None:
    compare("recorded", keywords.record_all())


def test_recording_sees_what_goes_through_keyword_arguments() -> None:
    found = keywords.record("gpt_oss")
    assert isinstance(found, dict)
    assert {"s_aux", "sliding_window", "scaling"} <= set(found["call"].split())
    assert {"hidden_states", "attention_mask"} < set(found["forward"].split())
    assert {"cache", "past_key_values"} & set(found["forward"].split())


OLD = {"a": {"forward": "x past", "call": "scale"}, "b": {"forward": "x past", "call": "scale cap"}}


@pytest.mark.parametrize(
    "new,words",
    [
        (OLD, []),
        ({**OLD, "c": {"forward": "x", "call": "cap"}}, []),
        ({"a": OLD["a"]}, ["attention functions are handed cap no longer; it was in b"]),
        ({**OLD, "c": {"forward": "x", "call": "bias"}}, ["attention functions are handed a new keyword, bias, in c"]),
        (
            {n: {**names, "forward": "cache x"} for n, names in OLD.items()},
            [
                "attention modules are handed a new keyword, cache, in a, b",
                "attention modules are handed past no longer; it was in a, b",
            ],
        ),
        ({**OLD, "a": {**OLD["a"], "call": "cap scale"}}, ["attention functions are handed cap now in a as well"]),
        ({**OLD, "a": {**OLD["a"], "call": ""}}, ["attention functions are handed scale no longer in a"]),
    ],
)
def test_differences_are_told_in_words(new: dict[str, Any], words: list[str]) -> None:
    assert keywords.differences(OLD, new) == words


def test_long_lists_of_types_are_cut() -> None:
    new = {f"t{n:02}": {"forward": "z", "call": ""} for n in range(30)}
    assert keywords.differences({}, new) == [
        "attention modules are handed a new keyword, z, in t00, t01, t02, t03, t04, t05, t06, t07 and 22 more"
    ]
