"""The `hfpatch` model of lm-eval: its `hf` model with a patch."""

import json
import logging
import os
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import Patch, PatchConfig, get_patch, patch_model
from ..errors import ConfigError, NotPatchedError
from ..version import __version__
from .merged_report import merge_reports
from .open_prompts import OpenPrompts
from .response_cache import ResponseKey, keep_apart
from .right_padding import RightPadding

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ConfigError("lm-eval is not installed; run `pip install 'hfpatch[eval]'`.") from error

EMBEDDED = "embedded"
PREFIX = "patch_"
logger = logging.getLogger(__name__)


def location(pretrained: Any) -> Any:
    """Where to load from: the embedded model's folder for "embedded"."""
    from hfpatch.evals.testbed import CHECKPOINT

    return str(CHECKPOINT) if isinstance(pretrained, str) and pretrained == EMBEDDED else pretrained


def resolve_patch(patch: str | None, settings: dict[str, Any]) -> PatchConfig | None:
    """Config of a patch spec with settings, None for "none". Raises ConfigError, UnknownMethodError."""
    from hfpatch.evals.run.variants import parse_variants

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
        raise ConfigError(f'patch_args={patch_args!r} is not an object of settings; write {{"window": 64}}.')
    own = [name for name in kwargs if name.startswith(PREFIX)]
    return {**(patch_args or {}), **{name.removeprefix(PREFIX): kwargs.pop(name) for name in own}}


@register_model("hfpatch")
class HFPatchLM(OpenPrompts, HFLM):
    """lm-eval's `hf` with a patch: `pretrained=...,patch=NAME,patch_window=64`, all else as for `hf`.

    `pretrained` may be "embedded"; `patch` is what the command line takes: a name, NAME+NAME, a config file or folder,
    a Hub id. Settings come as `patch_<setting>=value` or, where arguments are JSON, as an object in `patch_args`; in
    NAME+NAME they go to every method that knows them.
    `strict` refuses loglikelihood requests for methods in which a later token can change an earlier one.
    A cache of responses (`--use_cache`) keeps those of every model and patch apart.
    """

    last_report: ClassVar[str | None] = None

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
        super().__init__(location(pretrained), **kwargs)
        if not isinstance(pretrained, str):
            self._apply_patch()
        self._share_requests(kwargs.get("tp_plan") is not None)

    def _share_requests(self, tensor_parallel: bool) -> None:
        """Let every process of a launch take its part where `hf` sees to it on several GPUs only."""
        if self.world_size == 1 and not tensor_parallel and hasattr(self, "accelerator"):
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
        if launched and not hasattr(self, "accelerator"):
            logger.warning(
                "accelerate was asked for several processes but has started one, as it does on a CPU; set "
                "ACCELERATE_USE_CPU=true and add --multi_gpu, or start with torchrun --nproc-per-node."
            )

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        self._apply_patch()

    def _apply_patch(self) -> None:
        if self._patch_config is not None:
            patch_model(self._model, self._patch_config)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Called by lm-eval with its store of responses, which it shares between all models of that file."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            key = ResponseKey(self, self._strict)
            keep_apart(cache_hook.dbdict, lambda request: key.of(self.patch, request))

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
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
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
            return self.model(inps, attention_mask=mask).logits

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
            others = f"\n(process 1 of {self.world_size}; the results file adds all up)" * (self.world_size > 1)
            HFPatchLM.last_report = f"{self.patch.report()}{others}"
            info |= {"patch": self.patch.config.to_dict(), "patch_report": report}
        return info
