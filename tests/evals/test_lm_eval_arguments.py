"""What lm-eval is asked in: settings of a patch, names of patches, our model and tasks put into its arguments."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hfpatch.evals.tasks import LM_EVAL_FOLDER

from hfpatch import ConfigError, UnknownMethodError

pytest.importorskip("lm_eval")

from hfpatch.integrations import lm_eval as bridge
from hfpatch.integrations.lm_eval_model import resolve_patch, take_settings


def test_settings_come_as_arguments_json_or_object():
    wanted = {"sink": 2, "window": 8}
    rest = {"patch_sink": 2, "patch_window": 8, "dtype": "float32"}
    assert take_settings(None, rest) == wanted
    assert rest == {"dtype": "float32"}
    assert take_settings('{"sink": 2, "window": 8}', {}) == wanted
    assert take_settings({"sink": 1, "window": 8}, {"patch_sink": 2}) == wanted
    for text, part in (("sink=2", "not valid JSON"), ("[1]", "not an object")):
        with pytest.raises(ConfigError, match=part):
            take_settings(text, {})


def test_patch_specs():
    assert resolve_patch(None, {}) is None
    assert resolve_patch("none", {}) is None
    config = resolve_patch("dense+streaming", {"window": 8})
    assert [m.method for m in config.methods] == ["dense", "streaming"]
    assert config.methods[1].window == 8
    with pytest.raises(ConfigError, match="add patch=NAME"):
        resolve_patch(None, {"window": 8})
    with pytest.raises(UnknownMethodError, match="did you mean 'streaming'"):
        resolve_patch("streming", {})
    with pytest.raises(ConfigError, match="windw"):
        resolve_patch("streaming", {"windw": 8})


def test_our_model_and_tasks_are_put_into_the_arguments(tmp_path):
    args = Namespace(
        config=None, include_path="mine", model=None, model_args={"pretrained": "embedded"}, metadata=None
    )
    bridge._add_ours(args)
    assert args.model == "hfpatch"
    assert args.include_path == [str(LM_EVAL_FOLDER), "mine"]
    assert Path(args.metadata["tokenizer"]).name == "checkpoint"
    (tmp_path / "run.yaml").write_text("model: hf\ninclude_path: theirs\n", encoding="utf-8")
    args = Namespace(config=str(tmp_path / "run.yaml"), include_path=None, model=None, model_args=None, metadata=None)
    bridge._add_ours(args)
    assert (args.model, args.include_path, args.metadata) == ("hf", [str(LM_EVAL_FOLDER), "theirs"], None)


def test_help_and_bad_arguments_give_exit_codes(capsys):
    before = sys.argv
    assert bridge.main(["run", "--help"]) == 0
    assert "--model_args" in capsys.readouterr().out
    assert bridge.main(["run", "--no-such-option"]) == 2
    assert sys.argv is before
