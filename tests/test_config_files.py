"""Config files and names that are none: one sentence of our own, whatever they hold."""

from pathlib import Path
from typing import Any

import pytest

from hfpatch import ConfigError, PatchConfig, get_method
from hfpatch.config.patch_config import CONFIG_FILE
from hfpatch.config.registry import make_config

BAD_FILES = {
    "not json": ("{methods: ]", "is not valid JSON"),
    "empty": ("", "is not valid JSON"),
    "binary": (b"\xff\xfe\x00\x01", "is not valid JSON"),
    "a list": ("[]", "non-empty list under 'methods'"),
    "null": ("null", "non-empty list under 'methods'"),
    "no methods": ("{}", "non-empty list under 'methods'"),
    "methods empty": ('{"methods": []}', "non-empty list under 'methods'"),
    "methods no list": ('{"methods": "streaming"}', "non-empty list under 'methods'"),
    "entry no object": ('{"methods": ["streaming"]}', "needs a 'method' name"),
    "entry without name": ('{"methods": [{"window": 3}]}', "needs a 'method' name"),
    "name no text": ('{"methods": [{"method": 3}]}', "needs a 'method' name"),
    "bad value": ('{"methods": [{"method": "streaming", "window": -1}]}', "window=-1 is out of range"),
    "bad type": ('{"methods": [{"method": "streaming", "layers": {"a": 1}}]}', "wrong type"),
    "version no text": ('{"hfpatch_version": [1], "methods": []}', "non-empty list"),
    **{
        f"version {v[:9]}": (f'{{"hfpatch_version": "{v}", "methods": [{{"method": "dense"}}]}}', "is not a version")
        for v in ("1.²", "x", "-1", "9" * 5000, "\u0661.0")
    },
    "version a list": ('{"hfpatch_version": [1], "methods": [{"method": "dense"}]}', "is not a version"),
    "model no text": ('{"base_model_name_or_path": 5, "methods": [{"method": "dense"}]}', "named by text"),
    "set twice": ('{"methods": [{"method": "streaming", "window": 8, "window": 16}]}', "'window' is set twice"),
    "methods twice": (
        '{"methods": [{"method": "dense"}], "methods": [{"method": "dense"}]}',
        "'methods' is set twice",
    ),
    "set twice deep": ('{"methods": [{"method": "flux", "sparse_settings": {"a": 1, "a": 1}}]}', "'a' is set twice"),
    "nested": ('{"methods":' + "[" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000, "nested too deeply"),
    "nested settings": (
        '{"methods": [{"method": "flux", "sparse_settings": ' + '{"a": ' * 50 + "1" + "}" * 50 + "}]}",
        "wrong type",
    ),
    "digits": ('{"methods": [{"method": "streaming", "window": ' + "9" * 5000 + "}]}", "is not valid JSON"),
    "not a number": ('{"methods": [{"method": "gated", "start_bias": NaN}]}', "out of range"),
    "infinite": ('{"methods": [{"method": "zerotuning", "gamma": 1e999}]}', "out of range"),
    "utf-16": ('{"methods": [{"method": "dense"}]}'.encode("utf-16"), "is not valid JSON"),
    "latin-1": ('{"methods": [{"method": "dénse"}]}'.encode("latin-1"), "is not valid JSON"),
    "cut off": ('{"methods": [{"method": "dense"', "is not valid JSON"),
    "two values": ('{"methods": [{"method": "dense"}]} {}', "is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_files_give_one_sentence(case: str, tmp_path: Path) -> None:
    text, reason = BAD_FILES[case]
    (tmp_path / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        PatchConfig.from_pretrained(tmp_path)
    message = str(error.value)
    assert reason in message and message.endswith(".") and "\n" not in message


@pytest.mark.parametrize("version", ["0.1.0", "0.1", "0", "0.1.0.dev3", "0.1.0rc1+local", None])
def test_versions_that_are_not_newer(version: str | None) -> None:
    data = {"hfpatch_version": version, "methods": [{"method": "streaming", "window": 9}]}
    assert PatchConfig.from_dict(data).methods == [get_method("streaming").config_class(window=9)]
    with pytest.raises(ConfigError, match="there is no setting 'extra'"):
        PatchConfig.from_dict({**data, "extra": 1})


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b'\xef\xbb\xbf{"methods": [{"method": "dense"}]}')
    assert PatchConfig.from_pretrained(tmp_path).methods == [get_method("dense").config_class()]


ODD_NAMES = [None, 5, 1.5, True, b"x", [], {}, object(), "", "x" * 5000, "a\0b", "\ud800", "\n", "a b", "/dev/null"]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_names_that_are_none(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    calls = [
        lambda: PatchConfig.from_pretrained(name),
        lambda: get_method("gated")(make_config("gated", {"weights": name})),
    ]
    for call in calls if name is not None else calls[:1]:
        with pytest.raises(ConfigError) as error:
            call()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(ConfigError):
        PatchConfig.from_pretrained("nobody/nothing", revision=5)  # type: ignore[arg-type]
