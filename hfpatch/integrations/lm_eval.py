"""lm-eval on patched models: `--model hfpatch`, and lm-eval's own command with our model and tasks known to it."""

import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import Patch, PatchConfig, get_patch, patch_model
from ..errors import ConfigError, NotPatchedError
from ..version import __version__
from .right_padding import RightPadding

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError("lm-eval is not installed; run `pip install 'hfpatch[eval]'`.") from error

EMBEDDED = "embedded"
PREFIX = "patch_"
logger = logging.getLogger(__name__)


def resolve_patch(patch: str | None, settings: dict[str, Any]) -> PatchConfig | None:
    """Config of a patch spec with settings, None for "none". Raises ConfigError, UnknownMethodError."""
    from ..evals.variants import parse_variants

    if patch in (None, "", "none"):
        if settings:
            raise ConfigError(f"{PREFIX}{min(settings)} was given without a patch; add patch=NAME.")
        return None
    return parse_variants([str(patch)], settings)[1].config


def take_settings(patch_args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Settings from `patch_args` (a dict or its JSON) and from `patch_NAME=...`, which leave `kwargs`."""
    if isinstance(patch_args, str):
        try:
            patch_args = json.loads(patch_args)
        except ValueError as error:
            raise ConfigError(
                f"patch_args={patch_args!r} is not valid JSON ({error}); between commas write "
                f"{PREFIX}window=64,{PREFIX}sink=4 instead."
            ) from error
    if not isinstance(patch_args or {}, dict):
        raise ConfigError(f"patch_args={patch_args!r} is not an object of settings; write {{\"window\": 64}}.")
    own = [name for name in kwargs if name.startswith(PREFIX)]
    return {**(patch_args or {}), **{name.removeprefix(PREFIX): kwargs.pop(name) for name in own}}


@register_model("hfpatch")
class HFPatchLM(HFLM):  # type: ignore[misc]
    """lm-eval's `hf` with a patch: `pretrained=...,patch=NAME,patch_window=64`, all else as for `hf`.

    `pretrained` may be "embedded"; `patch` is what the command line takes: a name, NAME+NAME, a config file or folder,
    a Hub id. Settings come as `patch_<setting>=value` or, where arguments are JSON, as an object in `patch_args`.
    `strict` refuses loglikelihood requests for methods in which a later token can change an earlier one.
    """

    def __init__(
        self,
        pretrained: Any,
        patch: str | None = None,
        patch_args: dict[str, Any] | str | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        self._patch_config = resolve_patch(patch, take_settings(patch_args, kwargs))
        self._strict, self._warned = strict, False
        self._padding: RightPadding | None = None
        self._others: list[dict[str, Any]] = []
        super().__init__(_location(pretrained), **kwargs)
        if not isinstance(pretrained, str):
            self._apply_patch()
        if self.world_size == 1 and not kwargs.get("tp_plan") and hasattr(self, "accelerator"):
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        self._apply_patch()

    def _apply_patch(self) -> None:
        if self._patch_config is not None:
            patch_model(self._model, self._patch_config)

    @property
    def patch(self) -> Patch | None:
        """The handle of the patch, None when the model runs as it is."""
        try:
            return get_patch(self.model)
        except NotPatchedError:
            return None

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self._check_loglikelihood()
        size = self.max_length + 1
        self._padding = RightPadding((context + answer)[-size:][:-1] for _, context, answer in requests)
        try:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            self._padding = None

    def _check_loglikelihood(self) -> None:
        """Say once, or refuse, what one forward over question and answer means for the patch."""
        if self.patch is None or (self._warned and not self._strict):
            return
        self._warned = True
        loose = [m.name for m in self.patch.methods if m.causality != "yes"]
        idle = [m.name for m in self.patch.methods if m.points() and "prefill" not in m.acts_in]
        if loose:
            told = (
                f"Loglikelihood requests put the answer into the prompt, and with {' and '.join(loose)} later tokens "
                "can change what earlier ones attend to, so an answer can influence its own score"
            )
            if self._strict:
                raise ConfigError(f"{told}; use generation tasks, or leave out strict=True.")
            logger.warning("%s; generation tasks are not concerned.", told)
        if idle:
            logger.warning(
                "Loglikelihood requests are one prefill, in which %s does nothing: the scores are those of the model "
                "without it. Use generation tasks.",
                " and ".join(idle),
            )

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        plain = self.patch is None or self._padding is None or attn_mask is not None or labels is not None
        mask = None if plain else self._padding.mask(inps)  # type: ignore[union-attr]
        if mask is None:
            return super()._model_call(inps, attn_mask, labels)
        autocast = torch.autocast(
            self.device.type, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            return self.model(inps, attention_mask=mask).logits  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait for the other processes and collect what their patches did so far."""
        super().barrier()
        if self.world_size > 1 and self.patch is not None:
            self._others = (self.gather_object(self.patch.report().to_dict()) or [])[1:]

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model, with the patch and its report over all processes."""
        info = {**super().get_model_info(), "hfpatch_version": __version__, "patch": None}
        if self.patch is not None:
            report = merge_reports([self.patch.report().to_dict(), *self._others])
            logger.info("%s", self.patch.report())
            info |= {"patch": self.patch.config.to_dict(), "patch_report": report}
        return info


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report out of those of several processes, with density in all and by phase and the fallbacks on top."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (x for report in reports for x in report["lines"]):
        key = (line["layer"], line["name"], line["methods"], line["phase"])
        total = lines.setdefault(key, {**line, "calls": 0, "attended": 0, "visible": 0, "executors": {}, "fallbacks": {}})
        for name in ("calls", "attended", "visible"):
            total[name] += line[name]
        for name in ("executors", "fallbacks"):
            total[name] = dict(Counter(total[name]) + Counter(line[name]))
        total["density"] = _density([total])
    merged = list(lines.values())
    fallbacks: Counter[str] = sum((Counter(x["fallbacks"]) for x in merged), Counter())
    phases = {x["phase"] for x in merged}
    return {
        "density": _density(merged),
        "density_by_phase": {p: _density([x for x in merged if x["phase"] == p]) for p in sorted(phases)},
        "fallbacks": dict(fallbacks),
        **{**reports[0], "lines": merged},
        "processes": len(reports),
    }


def _density(lines: list[dict[str, Any]]) -> float:
    visible = sum(x["visible"] for x in lines)
    return sum(x["attended"] for x in lines) / visible if visible else 1.0


def _location(pretrained: Any) -> Any:
    from ..evals.testbed import CHECKPOINT

    return str(CHECKPOINT) if isinstance(pretrained, str) and pretrained == EMBEDDED else pretrained


def run_lm_eval(argv: Sequence[str]) -> int:
    """Run lm-eval's own command with `argv`; the model is `hfpatch` unless named, our tasks are known to it.

    Returns the exit code. Raises HfpatchError.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise ConfigError("This needs lm-eval 0.4.10 or newer; run `pip install -U 'lm-eval>=0.4.10'`.") from error
    setup_logging()
    before = sys.argv
    sys.argv = ["lm-eval", *argv]
    try:
        cli = HarnessCLI()
        args = cli.parse_args()
        _add_ours(args)
        cli.execute(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def _add_ours(args: Any) -> None:
    """Put our model, our tasks and the embedded model's tokenizer into lm-eval's parsed arguments."""
    from ..evals.tasks import LM_EVAL_FOLDER

    config: dict[str, Any] = {}
    if getattr(args, "config", None):
        from lm_eval.config.evaluate_config import EvaluatorConfig

        config = EvaluatorConfig.load_yaml_config(args.config)
    if hasattr(args, "include_path"):
        theirs = args.include_path or config.get("include_path") or []
        args.include_path = [str(LM_EVAL_FOLDER), *([theirs] if isinstance(theirs, str | Path) else theirs)]
    if hasattr(args, "model_args"):
        args.model = args.model or config.get("model") or "hfpatch"
        if (args.model_args or {}).get("pretrained") == EMBEDDED:
            args.metadata = {"tokenizer": _location(EMBEDDED), **(args.metadata or {})}


main = run_lm_eval

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
